/* Product of two tensors with MVE, four codes at a time. The zero point is added before rounding, counted as uint8. */
#include "mve/pools.h"

#if defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>

static void mul(const planish_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y, int32_t size)
{
    const float32x4_t zero = vdupq_n_f32((float)(l->y_zero_point + 128));
    const int16x8_t low = vdupq_n_s16((int16_t)l->low), high = vdupq_n_s16((int16_t)l->high);
    for (; size > 0; size -= 4) {
        mve_pred16_t lanes = vctp32q((uint32_t)size);
        int32x4_t first = vsubq_n_s32(vldrbq_z_s32(a, lanes), l->a_zero_point);
        int32x4_t second = vsubq_n_s32(vldrbq_z_s32(b, lanes), l->b_zero_point);
        float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(vmulq_s32(first, second)), l->rescale);
        int32x4_t sum = vcvtnq_s32_f32(vaddq_f32(value, zero));
        int16x8_t code = vqmovnbq_s32(vreinterpretq_s16_s32(sum), sum);
        code = vqsubq_n_s16(code, 128);
        code = vminq_s16(vmaxq_s16(code, low), high);
        vstrbq_p_s32(y, vreinterpretq_s32_s16(code), lanes);
        a += 4;
        b += 4;
        y += 4;
    }
}

#else

static void mul(const planish_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y, int32_t size)
{
    for (; size > 0; size--) {
        float code = (float)((*a++ - l->a_zero_point) * (*b++ - l->b_zero_point)) * l->rescale;
        code = planish_clamp(code + (float)(l->y_zero_point + 128), (float)(l->low + 128), (float)(l->high + 128));
        *y++ = (int8_t)(planish_round(code) - 128);
    }
}

#endif

void planish_mve_mul(const planish_mve_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t done;
    for (done = 0; done < l->size; done += l->operand_size) {
        mul(l, a + done, b, y + done, l->operand_size);
    }
}

void planish_mve_mul_constant(const planish_mve_mul_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_mul_layer same = {l->size,         l->operand_size, l->a_zero_point, l->b_zero_point,
                              l->y_zero_point, l->rescale,      l->low,          l->high};
    planish_mve_mul(&same, a, l->operand, y);
}
