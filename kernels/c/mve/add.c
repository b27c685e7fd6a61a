/* Sum of two tensors with MVE and integer factors, which were chosen and tried on all pairs of codes at export.
 *
 * PLANISH_SHIFT: bits of a sum below the code's. PLANISH_CONSTANT: the second operand is constant. PLANISH_CLAMP: the codes' bounds
 * are not those of int8.
 */
#include "mve/add.h"

#ifdef PLANISH_CONSTANT
typedef planish_mve_add_constant_layer layer_t;
#else
typedef planish_mve_add_layer layer_t;
#endif

#if defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>

/* `size` codes, with one code of b for one of a */
static inline void add(const layer_t *l, const int8_t *a, const int8_t *b, int8_t *y, int32_t size)
{
#ifdef PLANISH_CLAMP
    const int8x16_t low = vdupq_n_s8((int8_t)l->low), high = vdupq_n_s8((int8_t)l->high);
#endif
    const int32_t factor_a = l->factor_a, factor_b = l->factor_b, start = l->start;
    for (; size > 0; size -= 4) {
        mve_pred16_t lanes = vctp32q((uint32_t)size);
        int32x4_t sum = vmulq_n_s32(vldrbq_z_s32(a, lanes), factor_a);
        int16x8_t half;
        int8x16_t code;
        sum = vmlaq_n_s32(sum, vldrbq_z_s32(b, lanes), factor_b);
        sum = vaddq_n_s32(sum, start);
        /* no narrowing shift: binutils 2.40 assembles VQSHRN as its rounding sister */
        sum = vshrq_n_s32(sum, PLANISH_SHIFT);
        half = vqmovnbq_s32(vreinterpretq_s16_s32(sum), sum);
        code = vqmovnbq_s16(vreinterpretq_s8_s16(half), half);
#ifdef PLANISH_CLAMP
        code = vminq_s8(vmaxq_s8(code, low), high);
#endif
        vstrbq_p_s32(y, vreinterpretq_s32_s8(code), lanes);
        a += 4;
        b += 4;
        y += 4;
    }
}

#else

static inline void add(const layer_t *l, const int8_t *a, const int8_t *b, int8_t *y, int32_t size)
{
    for (; size > 0; size--) {
        int32_t code = (l->start + *a++ * l->factor_a + *b++ * l->factor_b) >> PLANISH_SHIFT;
        code = code < l->low ? l->low : code;
        *y++ = (int8_t)(code > l->high ? l->high : code);
    }
}

#endif

#ifdef PLANISH_CONSTANT
void PLANISH_KERNEL(const layer_t *l, const int8_t *a, int8_t *y)
{
    const int8_t *b = l->operand;
#else
void PLANISH_KERNEL(const layer_t *l, const int8_t *a, const int8_t *b, int8_t *y)
{
#endif
    int32_t done;
    for (done = 0; done < l->size; done += l->operand_size) {
        add(l, a + done, b, y + done, l->operand_size);
    }
}
