/* Matrix product of two activations with SMLAD. Rows of a and columns of b wait in scratch as pairs of int16, less their zero
 * points: of four neighbours x0 x1 x2 x3 the words (x0, x2) and (x1, x3); depths that are not there are 0. Two rows, and two columns,
 * take turns word by word, and meet in four sums; where there is only one, it is there twice. */
#include "dsp/matmul.h"
#include "dsp/halves.h"

enum { WAYS = 2 }; /* vectors that take turns */

/* halves of a less those of b */
static inline uint32_t less(uint32_t a, uint32_t b)
{
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    return (uint32_t)__ssub16((int16x2_t)a, (int16x2_t)b);
#else
    return ((a - b) & 0xFFFFu) | ((a & 0xFFFF0000u) - (b & 0xFFFF0000u));
#endif
}

/* one vector of `depth` codes, `step` apart */
static PLANISH_APART void gather(const int8_t *x, int32_t step, int32_t words, int32_t depth, uint32_t zero_points,
                                 uint32_t *to)
{
    int32_t k = 0, zero_point = (int16_t)zero_points;
    if (words) {
        for (; k + 4 <= depth; k += 4) {
            uint32_t word = planish_load_word(x + k);
            to[0] = less(planish_even_bytes(word), zero_points);
            to[WAYS] = less(planish_odd_bytes(word), zero_points);
            to += 2 * WAYS;
        }
        x += k;
    }
    PLANISH_ROLLED
    for (; k < depth; k += 4) {
        int32_t v[4] = {0, 0, 0, 0}, i, count = depth - k < 4 ? depth - k : 4;
        PLANISH_ROLLED
        for (i = 0; i < count; i++) {
            v[i] = *x - zero_point;
            x += step;
        }
        to[0] = planish_low_halves((uint32_t)v[0], (uint32_t)v[2]);
        to[WAYS] = planish_low_halves((uint32_t)v[1], (uint32_t)v[3]);
        to += 2 * WAYS;
    }
}

/* four columns whose codes lie in words, a word for each depth, `step` apart; two columns are `size` words */
static PLANISH_APART void turn(const int8_t *x, int32_t step, int32_t depth, uint32_t zero_points, uint32_t *to,
                               int32_t size)
{
    int32_t k;
    for (k = 0; k < depth; k += 4) {
        int32_t i;
        for (i = 0; i < 2; i++) { /* depths k + i and k + i + 2 */
            uint32_t even[2] = {0, 0}, odd[2] = {0, 0};
            if (k + i < depth) {
                uint32_t word = planish_load_word(x + i * step);
                even[0] = less(planish_even_bytes(word), zero_points);
                odd[0] = less(planish_odd_bytes(word), zero_points);
            }
            if (k + i + 2 < depth) {
                uint32_t word = planish_load_word(x + (i + 2) * step);
                even[1] = less(planish_even_bytes(word), zero_points);
                odd[1] = less(planish_odd_bytes(word), zero_points);
            }
            to[0] = planish_low_halves(even[0], even[1]);
            to[1] = planish_low_halves(odd[0], odd[1]);
            to[size] = planish_high_halves(even[0], even[1]);
            to[size + 1] = planish_high_halves(odd[0], odd[1]);
            to += WAYS;
        }
        x += 4 * step;
    }
}

/* sums[2 * row + column] of two rows and two columns of `units` times four depths */
static inline void products(const uint32_t *a, const uint32_t *b, int32_t units, int32_t *sums)
{
    int32_t s00 = 0, s01 = 0, s10 = 0, s11 = 0;
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
    uint32_t a0, a1, b0, b1;
    __asm__("1:\n"
            "ldrd %[a0], %[a1], [%[a]], #8\n"
            "ldrd %[b0], %[b1], [%[b]], #8\n"
            "smlad %[s00], %[a0], %[b0], %[s00]\n"
            "smlad %[s01], %[a0], %[b1], %[s01]\n"
            "smlad %[s10], %[a1], %[b0], %[s10]\n"
            "smlad %[s11], %[a1], %[b1], %[s11]\n"
            "ldrd %[a0], %[a1], [%[a]], #8\n"
            "ldrd %[b0], %[b1], [%[b]], #8\n"
            "smlad %[s00], %[a0], %[b0], %[s00]\n"
            "smlad %[s01], %[a0], %[b1], %[s01]\n"
            "smlad %[s10], %[a1], %[b0], %[s10]\n"
            "smlad %[s11], %[a1], %[b1], %[s11]\n"
            "subs %[units], %[units], #1\n"
            "bne 1b\n"
            : [a] "+r"(a), [b] "+r"(b), [units] "+r"(units), [a0] "=&r"(a0), [a1] "=&r"(a1), [b0] "=&r"(b0),
              [b1] "=&r"(b1), [s00] "+r"(s00), [s01] "+r"(s01), [s10] "+r"(s10), [s11] "+r"(s11)
            :
            : "cc", "memory");
#else
    for (units *= 2; units > 0; units--) {
        s00 = planish_dot(a[0], b[0], s00);
        s01 = planish_dot(a[0], b[1], s01);
        s10 = planish_dot(a[1], b[0], s10);
        s11 = planish_dot(a[1], b[1], s11);
        a += WAYS;
        b += WAYS;
    }
#endif
    sums[0] = s00;
    sums[1] = s01;
    sums[2] = s10;
    sums[3] = s11;
}

/* two rows, the second `next` behind the first, by `count` columns */
static PLANISH_APART void multiply(const planish_dsp_matmul_layer *l, const uint32_t *a, const uint32_t *b, int32_t next,
                                   int32_t count, int8_t *y)
{
    float rescale = l->rescale;
    int32_t zero_point = l->y_zero_point, low = l->low, high = l->high, step = l->y_column, units = l->units;
    for (; count > 0; count -= 2) {
        int32_t sums[4], i;
        int8_t *out = y + next, *other;
        products(a, b, units, sums);
        other = count > 1 ? out + step : out;
        for (i = 2; i >= 0; i -= 2) { /* the second row first: where there is none, it is the first one */
            int32_t code0 = planish_nearest((float)sums[i] * rescale) + zero_point;
            int32_t code1 = planish_nearest((float)sums[i + 1] * rescale) + zero_point;
            code0 = code0 < low ? low : code0;
            code1 = code1 < low ? low : code1;
            *other = (int8_t)(code1 > high ? high : code1);
            *out = (int8_t)(code0 > high ? high : code0);
            out -= next;
            other -= next;
        }
        y += 2 * step;
        b += 2 * WAYS * units;
    }
}

void planish_dsp_matmul(const planish_dsp_matmul_layer *l, const int8_t *a, const int8_t *b, int8_t *y, int8_t *scratch)
{
    int32_t size = 2 * WAYS * l->units, batch, first, row, c; /* words of two vectors */
    uint32_t *rows = (uint32_t *)(void *)scratch, *columns = rows + size;
    uint32_t a_zero_points = planish_low_halves((uint32_t)l->a_zero_point, (uint32_t)l->a_zero_point);
    uint32_t b_zero_points = planish_low_halves((uint32_t)l->b_zero_point, (uint32_t)l->b_zero_point);
    for (batch = 0; batch < l->batches; batch++) {
        const int8_t *left = a + l->a_offset + batch * l->a_batch;
        const int8_t *right = b + l->b_offset + batch * l->b_batch;
        int8_t *out = y + l->y_offset + batch * l->y_batch;
        for (first = 0; first < l->columns; first += l->held) {
            int32_t count = l->columns - first < l->held ? l->columns - first : l->held;
            const int8_t *in = right + first * l->b_column;
            if (l->b_words == 2) {
                for (c = 0; c < count; c += 4) {
                    turn(in + c, l->b_row, l->depth, b_zero_points, columns + c / WAYS * size, size);
                }
            } else {
                for (c = 0; c < count + count % WAYS; c++) {
                    const int8_t *column = in + (c < count ? c : c - 1) * l->b_column;
                    uint32_t *to = columns + c / WAYS * size + c % WAYS;
                    gather(column, l->b_row, l->b_words, l->depth, b_zero_points, to);
                }
            }
            for (row = 0; row < l->rows; row += 2) {
                const int8_t *top = left + row * l->a_row;
                int32_t second = row + 1 < l->rows;
                gather(top, l->a_column, l->a_words, l->depth, a_zero_points, rows);
                gather(top + second * l->a_row, l->a_column, l->a_words, l->depth, a_zero_points, rows + 1);
                multiply(l, rows, columns, second * l->y_row, count, out + row * l->y_row + first * l->y_column);
            }
        }
    }
}
