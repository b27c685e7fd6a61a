/* Mean of each channel over all pixels. Four channels are added at a time, as two words of two 16-bit sums of codes plus 128. */
#include "armv6m/global_average_pool.h"

enum { BLOCK = 257 }; /* pixels whose sums fit 16 bits */

static void add_words(const int8_t *x, int32_t pixels, int32_t channels, int32_t *sum)
{
    int32_t i;
    PLANISH_SMALL_LOOP
    for (i = 0; i < 4; i++) {
        sum[i] = -128 * pixels;
    }
    while (pixels > 0) {
        int32_t count = pixels < BLOCK ? pixels : BLOCK;
        uint32_t even = 0, odd = 0;
        pixels -= count;
        for (; count > 0; count--) {
            uint32_t word = *(const uint32_t *)(const void *)x ^ 0x80808080u;
            even += word & 0x00FF00FFu;
            odd += word >> 8 & 0x00FF00FFu;
            x += channels;
        }
        sum[0] += (int32_t)(even & 0xFFFFu);
        sum[1] += (int32_t)(odd & 0xFFFFu);
        sum[2] += (int32_t)(even >> 16);
        sum[3] += (int32_t)(odd >> 16);
    }
}

void planish_armv6m_global_average_pool(const planish_armv6m_global_average_pool_layer *l, const int8_t *x, int8_t *y)
{
    int32_t channel = 0, pixel, i;
    if ((l->channels & 3) == 0 && ((uintptr_t)x & 3u) == 0) {
        PLANISH_SMALL_LOOP
        for (; channel < l->channels; channel += 4) {
            int32_t sum[4];
            add_words(x + channel, l->pixels, l->channels, sum);
            PLANISH_SMALL_LOOP
            for (i = 0; i < 4; i++) {
                *y++ = (int8_t)planish_code(sum[i] + l->bias, l->word, &l->scale);
            }
        }
    }
    for (; channel < l->channels; channel++) {
        const int8_t *code = x + channel;
        int32_t sum = l->bias;
        PLANISH_SMALL_LOOP
        for (pixel = l->pixels; pixel > 0; pixel--) {
            sum += *code;
            code += l->channels;
        }
        *y++ = (int8_t)planish_code(sum, l->word, &l->scale);
    }
}
