/* Softmax with tabled exponentials, as planish_softmax: the few operations on float32 that it takes, in integers.
 *
 * Numbers are positive, and those too small for a normal float32 count as 0: beside a sum of at least 2^24 they change nothing.
 */
#include "armv6m/softmax.h"
#include "armv6m/requantize.h"

/* mantissa (24 bits, the first one set; 0 for zero) times 2^exponent */
typedef struct {
    uint32_t mantissa;
    int32_t exponent;
} number;

static number unpack(uint32_t bits)
{
    number n;
    n.exponent = (int32_t)(bits >> 23) - 150;
    n.mantissa = bits >> 23 ? (bits & 0x7FFFFFu) | 0x800000u : 0;
    return n;
}

/* value * 2^exponent with 24 bits, rounded half to even; `rest` says that value is a little larger */
static __attribute__((noinline)) number rounded(uint64_t value, int32_t exponent, uint32_t rest)
{
    number n = {0, exponent};
    PLANISH_SMALL_LOOP
    while (value >> 25) {
        rest |= (uint32_t)value & 1u;
        value >>= 1;
        n.exponent++;
    }
    n.mantissa = (uint32_t)value;
    if (n.mantissa >> 24) {
        uint32_t half = n.mantissa & 1u;
        n.mantissa >>= 1;
        n.exponent++;
        n.mantissa += half & (rest | n.mantissa) & 1u;
    }
    if (n.mantissa >> 24) {
        n.mantissa >>= 1;
        n.exponent++;
    }
    return n;
}

static __attribute__((noinline)) number add(number a, number b)
{
    int32_t apart;
    if (a.mantissa == 0 || b.mantissa == 0) {
        return a.mantissa ? a : b;
    }
    if (a.exponent < b.exponent) {
        number larger = b;
        b = a;
        a = larger;
    }
    apart = a.exponent - b.exponent;
    if (apart > 30) {
        return a;
    }
    return rounded(((uint64_t)a.mantissa << apart) + b.mantissa, b.exponent, 0);
}

/* round_half_even(a / b), at most 512 */
static __attribute__((noinline)) int32_t quotient(number a, number b)
{
    int32_t places = a.exponent - b.exponent, i;
    uint32_t bits = 0, left = a.mantissa;
    number q;
    if (a.mantissa == 0 || places < -34) {
        return 0;
    }
    if (places > 16) {
        return 512;
    }
    PLANISH_SMALL_LOOP
    for (i = 0; i < 27; i++) { /* 26 bits or more, rounded to float32 first */
        bits <<= 1;
        if (left >= b.mantissa) {
            left -= b.mantissa;
            bits |= 1u;
        }
        left <<= 1;
    }
    q = rounded(bits, places - 26, left != 0);
    if (q.exponent >= 0) {
        return 512;
    }
    if (q.exponent < -25) {
        return 0;
    }
    left = q.mantissa & ((1u << -q.exponent) - 1u);
    bits = q.mantissa >> -q.exponent;
    bits += left + (bits & 1u) > 1u << (-q.exponent - 1);
    return bits > 512u ? 512 : (int32_t)bits;
}

void planish_armv6m_softmax(const planish_armv6m_softmax_layer *l, const int8_t *x, int8_t *y)
{
    number inverse = unpack(l->inverse_scale);
    int32_t o, i, k;
    for (o = 0; o < l->outer; o++) {
        for (i = 0; i < l->inner; i++) {
            const int8_t *in = x + o * l->size * l->inner + i;
            int8_t *out = y + o * l->size * l->inner + i;
            int32_t largest = -128;
            const uint32_t *exponentials;
            number sum = {0, 0};
            PLANISH_SMALL_LOOP
            for (k = 0; k < l->size; k++) {
                largest = in[k * l->inner] > largest ? in[k * l->inner] : largest;
            }
            exponentials = l->exponentials + 255 - largest; /* the largest code meets the last exponential */
            PLANISH_SMALL_LOOP
            for (k = 0; k < l->size; k++) {
                sum = add(sum, unpack(exponentials[in[k * l->inner]]));
            }
            PLANISH_SMALL_LOOP
            for (k = 0; k < l->size; k++) {
                number e = unpack(exponentials[in[k * l->inner]]);
                int32_t code = quotient(rounded((uint64_t)e.mantissa * inverse.mantissa, e.exponent + inverse.exponent, 0), sum);
                code += l->y_zero_point;
                code = code < l->low ? l->low : code;
                out[k * l->inner] = (int8_t)(code > l->high ? l->high : code);
            }
        }
    }
}
