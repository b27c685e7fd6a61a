/* Product of two tensors, four codes a word. The zero point is added before rounding, counted as uint8. */
#include "dsp/halves.h"
#include "dsp/mul.h"

static inline int8_t one(int32_t product, float rescale, float zero, int32_t low, int32_t high)
{
    float code = (float)product * rescale;
    int32_t rounded = planish_nearest(code + zero) - 128;
    rounded = rounded < low ? low : rounded;
    return (int8_t)(rounded > high ? high : rounded);
}

static PLANISH_COPIED void mul(const planish_dsp_mul_layer *l, int32_t low, int32_t high, const int8_t *a, const int8_t *b,
                               int8_t *y)
{
    int32_t size = l->operand_size, zero_a = l->a_zero_point, zero_b = l->b_zero_point;
    uint32_t zeros_a = 0x10001u * (uint16_t)-zero_a, zeros_b = 0x10001u * (uint16_t)-zero_b;
    float rescale = l->rescale, zero = (float)(l->y_zero_point + 128);
    if ((((uintptr_t)a | (uintptr_t)b | (uintptr_t)y) & 3u) == 0) {
        PLANISH_ROLLED
        for (; size >= 4; size -= 4) {
            uint32_t word_a = planish_load_word(a), word_b = planish_load_word(b);
            uint32_t even_a = planish_add_even_bytes(zeros_a, word_a), even_b = planish_add_even_bytes(zeros_b, word_b);
            uint32_t odd_a = planish_add_odd_bytes(zeros_a, word_a), odd_b = planish_add_odd_bytes(zeros_b, word_b);
            y[0] = one((int16_t)even_a * (int16_t)even_b, rescale, zero, low, high);
            y[1] = one((int16_t)odd_a * (int16_t)odd_b, rescale, zero, low, high);
            y[2] = one(((int32_t)even_a >> 16) * ((int32_t)even_b >> 16), rescale, zero, low, high);
            y[3] = one(((int32_t)odd_a >> 16) * ((int32_t)odd_b >> 16), rescale, zero, low, high);
            a += 4;
            b += 4;
            y += 4;
        }
    }
    PLANISH_ROLLED
    for (; size > 0; size--) {
        *y++ = one((*a++ - zero_a) * (*b++ - zero_b), rescale, zero, low, high);
    }
}

void planish_dsp_mul(const planish_dsp_mul_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t done;
    for (done = 0; done < l->size; done += l->operand_size) {
        if (l->low == -128 && l->high == 127) {
            mul(l, -128, 127, a + done, b, y + done); /* constants, so that one instruction saturates */
        } else {
            mul(l, l->low, l->high, a + done, b, y + done);
        }
    }
}

void planish_dsp_mul_constant(const planish_dsp_mul_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_dsp_mul_layer same = {l->size,    l->operand_size, l->a_zero_point, l->b_zero_point, l->y_zero_point,
                                  l->rescale, l->low,          l->high};
    planish_dsp_mul(&same, a, l->operand, y);
}
