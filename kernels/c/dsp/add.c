/* Sum of two tensors with integer factors, which were chosen and tried on all pairs of codes at export. Four codes a word. */
#include "dsp/add.h"
#include "dsp/halves.h"

static inline int8_t code_of(int32_t sum, int32_t low, int32_t high)
{
    int32_t code = sum >> PLANISH_DSP_ADD_SHIFT;
    code = code < low ? low : code;
    return (int8_t)(code > high ? high : code);
}

/* `size` codes, with one code of b for one of a */
static PLANISH_COPIED void add(int32_t size, int32_t factor_a, int32_t factor_b, int32_t start, int32_t low, int32_t high,
                       const int8_t *a, const int8_t *b, int8_t *y)
{
    const uint32_t mask = 0xFF00FF00u;
    if ((((uintptr_t)a | (uintptr_t)b | (uintptr_t)y) & 3u) == 0) {
        PLANISH_ROLLED
        for (; size >= 4; size -= 4) {
            uint32_t word_a = planish_load_word(a), word_b = planish_load_word(b);
            uint32_t even_a = word_a << 8 & mask, odd_a = word_a & mask;
            uint32_t even_b = word_b << 8 & mask, odd_b = word_b & mask;
            int32_t sum0 = planish_product_low(factor_a, even_a, planish_product_low(factor_b, even_b, start));
            int32_t sum1 = planish_product_low(factor_a, odd_a, planish_product_low(factor_b, odd_b, start));
            int32_t sum2 = planish_product_high(factor_a, even_a, planish_product_high(factor_b, even_b, start));
            int32_t sum3 = planish_product_high(factor_a, odd_a, planish_product_high(factor_b, odd_b, start));
            y[0] = code_of(sum0, low, high);
            y[1] = code_of(sum1, low, high);
            y[2] = code_of(sum2, low, high);
            y[3] = code_of(sum3, low, high);
            a += 4;
            b += 4;
            y += 4;
        }
    }
    PLANISH_ROLLED
    for (; size > 0; size--) {
        uint32_t half_a = (uint32_t)(int32_t)*a++ << 8, half_b = (uint32_t)(int32_t)*b++ << 8;
        int32_t sum = planish_product_low(factor_a, half_a, planish_product_low(factor_b, half_b, start));
        *y++ = code_of(sum, low, high);
    }
}

/* the usual bounds as constants, so that one instruction saturates */
static PLANISH_APART void whole(int32_t size, int32_t factor_a, int32_t factor_b, int32_t start, const int8_t *a,
                                const int8_t *b, int8_t *y)
{
    add(size, factor_a, factor_b, start, -128, 127, a, b, y);
}

static void add_all(const planish_dsp_add_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    int32_t done, i;
    if (l->operand_size == 1) {
        int32_t start = planish_product_low(l->factor_b, (uint32_t)(int32_t)*b << 8, l->start);
        PLANISH_ROLLED
        for (i = 0; i < l->size; i++) {
            y[i] = code_of(planish_product_low(l->factor_a, (uint32_t)(int32_t)a[i] << 8, start), l->low, l->high);
        }
        return;
    }
    for (done = 0; done < l->size; done += l->operand_size) {
        if (l->low == -128 && l->high == 127) {
            whole(l->operand_size, l->factor_a, l->factor_b, l->start, a + done, b, y + done);
        } else {
            add(l->operand_size, l->factor_a, l->factor_b, l->start, l->low, l->high, a + done, b, y + done);
        }
    }
}

void planish_dsp_add(const planish_dsp_add_layer *l, const int8_t *a, const int8_t *b, int8_t *y)
{
    add_all(l, a, b, y);
}

void planish_dsp_add_constant(const planish_dsp_add_constant_layer *l, const int8_t *a, int8_t *y)
{
    planish_dsp_add_layer same = {l->size, l->operand_size, l->factor_a, l->factor_b, l->start, l->low, l->high};
    add_all(&same, a, l->operand, y);
}
