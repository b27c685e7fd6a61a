/* Mean of each channel over all pixels, with MVE: eight channels at a time. */
#include "mve/pools.h"

#if defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>

enum { CHANNELS = 8, MOST = 255 }; /* 255 codes of one sign fit 16 bits */

void planish_mve_global_average_pool(const planish_mve_global_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    const int16x8_t low = vdupq_n_s16((int16_t)l->low), high = vdupq_n_s16((int16_t)l->high);
    const float rescale = l->rescale;
    int32_t left;
    for (left = l->channels; left > 0; left -= CHANNELS) {
        const mve_pred16_t lanes = vctp16q((uint32_t)left);
        const int8_t *source = x;
        int32x4_t even = vdupq_n_s32(-l->x_zero_point * l->pixels), odd = even;
        int16x8_t code;
        int32_t pixels = l->pixels;
        while (pixels > 0) {
            int16x8_t sum = vdupq_n_s16(0);
            int32_t count = pixels < MOST ? pixels : MOST, i;
            for (i = count; i > 0; i--) {
                sum = vaddq_s16(sum, vldrbq_z_s16(source, lanes));
                source += l->channels;
            }
            even = vaddq_s32(even, vmovlbq_s16(sum));
            odd = vaddq_s32(odd, vmovltq_s16(sum));
            pixels -= count;
        }
        even = vcvtnq_s32_f32(vmulq_n_f32(vcvtq_f32_s32(even), rescale));
        odd = vcvtnq_s32_f32(vmulq_n_f32(vcvtq_f32_s32(odd), rescale));
        code = vqmovnbq_s32(vdupq_n_s16(0), even);
        code = vqmovntq_s32(code, odd);
        code = vqaddq_n_s16(code, (int16_t)l->y_zero_point);
        code = vminq_s16(vmaxq_s16(code, low), high);
        vstrbq_p_s16(y, code, lanes);
        x += CHANNELS;
        y += CHANNELS;
    }
}

#else

void planish_mve_global_average_pool(const planish_mve_global_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t channel, pixel;
    for (channel = 0; channel < l->channels; channel++) {
        int32_t sum = -l->x_zero_point * l->pixels;
        for (pixel = 0; pixel < l->pixels; pixel++) {
            sum += x[pixel * l->channels + channel];
        }
        y[channel] = planish_requantize(sum, l->rescale, (float)(l->low - l->y_zero_point),
                                        (float)(l->high - l->y_zero_point), l->y_zero_point);
    }
}

#endif
