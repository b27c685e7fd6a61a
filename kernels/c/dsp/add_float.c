/* Sum of two tensors by the float formula, four codes a word; for scales that no integer factors fit. Codes count from 0. */
#include "dsp/add.h"
#include "dsp/halves.h"

static inline int8_t one(float a, float b, float ratio_a, float ratio_b, float fixed, int32_t low, int32_t high)
{
    int32_t code = planish_nearest(planish_fma(a, ratio_a, planish_fma(b, ratio_b, fixed))) - 128;
    code = code < low ? low : code;
    return (int8_t)(code > high ? high : code);
}

static PLANISH_COPIED void add(int32_t size, float ratio_a, float ratio_b, float fixed, int32_t low, int32_t high, const int8_t *a,
                       const int8_t *b, int8_t *y)
{
    if ((((uintptr_t)a | (uintptr_t)b | (uintptr_t)y) & 3u) == 0) {
        PLANISH_ROLLED
        for (; size >= 4; size -= 4) {
            uint32_t p = planish_load_word(a) ^ 0x80808080u, q = planish_load_word(b) ^ 0x80808080u;
            y[0] = one((float)(p & 255u), (float)(q & 255u), ratio_a, ratio_b, fixed, low, high);
            y[1] = one((float)(p >> 8 & 255u), (float)(q >> 8 & 255u), ratio_a, ratio_b, fixed, low, high);
            y[2] = one((float)(p >> 16 & 255u), (float)(q >> 16 & 255u), ratio_a, ratio_b, fixed, low, high);
            y[3] = one((float)(p >> 24), (float)(q >> 24), ratio_a, ratio_b, fixed, low, high);
            a += 4;
            b += 4;
            y += 4;
        }
    }
    PLANISH_ROLLED
    for (; size > 0; size--) {
        *y++ = one((float)(*a++ + 128), (float)(*b++ + 128), ratio_a, ratio_b, fixed, low, high);
    }
}

void planish_dsp_add_float(const planish_dsp_add_float_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t done;
    for (done = 0; done < l->size; done += l->operand_size) {
        if (l->low == -128 && l->high == 127) {
            /* constants, so that one instruction saturates */
            add(l->operand_size, l->ratio_a, l->ratio_b, l->fixed, -128, 127, a + done, b, y + done);
        } else {
            add(l->operand_size, l->ratio_a, l->ratio_b, l->fixed, l->low, l->high, a + done, b, y + done);
        }
    }
}

void planish_dsp_add_float_constant(const planish_dsp_add_float_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_dsp_add_float_layer same = {l->size, l->operand_size, l->ratio_a, l->ratio_b, l->fixed, l->low, l->high};
    planish_dsp_add_float(&same, a, l->operand, y);
}
