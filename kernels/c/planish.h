/* Integer kernels of planish: portable C99, no allocation, no library calls.
 *
 * Activations are int8 codes; real = scale * (code - zero_point). Four-dimensional tensors lie channels last (height,
 * width, channels), all others as in ONNX; the batch is 1. Every kernel has one constant layer struct: numbers first, then
 * pointers to constant arrays. A pointer that is described as optional may be null.
 *
 * Kernels for Cortex-M with an FPU expect its rounding mode to be the one after reset, to nearest (FPSCR.RMode 0).
 *
 * All float arithmetic is IEEE single precision, one rounding an operation: build with -ffp-contract=off and without
 * -ffast-math. Results are then the same bits on every core, with or without a floating-point unit.
 */
#ifndef PLANISH_H
#define PLANISH_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- shared arithmetic ---- */

/* Round half to even, for |v| < 2^22: adding 1.5 * 2^23 leaves no bits below 1. */
static inline int32_t planish_round(float v)
{
    union { float f; int32_t i; } bits;
    bits.f = v + 12582912.0f;
    return bits.i - 0x4B400000;
}

static inline float planish_clamp(float v, float low, float high)
{
    v = v < low ? low : v;
    return v > high ? high : v;
}

/* The code of an int32 sum. low and high are the bounds of the code, less the zero point. */
static inline int8_t planish_requantize(int32_t sum, float rescale, float low, float high, int32_t zero_point)
{
    return (int8_t)(planish_round(planish_clamp((float)sum * rescale, low, high)) + zero_point);
}

/* a * b + c, rounded once. Where no instruction is used the sum is rounded to odd in double precision, which makes the
 * second rounding harmless (Boldo and Melquiond 2008); the product of two floats is exact there. */
static inline float planish_fma(float a, float b, float c)
{
#if defined(__arm__) && defined(__ARM_FEATURE_FMA) && defined(__ARM_FP) && (__ARM_FP & 4)
    __asm__("vfma.f32 %0, %1, %2" : "+t"(c) : "t"(a), "t"(b)); /* the built-in may become a library call */
    return c;
#else
    union { double f; uint64_t i; } total;
    double product = (double)a * (double)b;
    double addend = (double)c;
    double back, lost;
    total.f = product + addend;
    back = total.f - product;
    lost = (product - (total.f - back)) + (addend - back);
    if (lost != 0.0 && (total.i & 1u) == 0u) {
        total.i += (lost > 0.0) == (total.f > 0.0) ? (uint64_t)1 : ~(uint64_t)0;
    }
    return (float)total.f;
#endif
}

/* table[code], or the code itself without a table; table[0] belongs to code -128 */
static inline int8_t planish_look_up(const int8_t *table, int8_t code)
{
    return table ? table[(int32_t)code + 128] : code;
}

/* `size` codes, through a table where there is one */
static inline void planish_copy(const int8_t *table, const int8_t *x, int8_t *y, int32_t size)
{
    int32_t i;
    if (table) {
        for (i = 0; i < size; i++) {
            y[i] = table[(int32_t)x[i] + 128];
        }
    } else {
        for (i = 0; i < size; i++) {
            y[i] = x[i];
        }
    }
}

/* Code i of packed codes: `bits` (8, 4 or 2) bits each, the first in the lowest bits of its byte. */
static inline int32_t planish_unpack(const int8_t *x, int32_t i, int32_t bits)
{
    int32_t bit = i * bits;
    int32_t sign = 1 << (bits - 1);
    int32_t code = ((uint8_t)x[bit >> 3] >> (bit & 7)) & (2 * sign - 1);
    return (code ^ sign) - sign;
}

/* Sets code i of packed codes; the others of its byte stay. */
static inline void planish_pack(int8_t *y, int32_t i, int32_t bits, int32_t code)
{
    int32_t bit = i * bits;
    int32_t mask = ((1 << bits) - 1) << (bit & 7);
    int32_t others = (uint8_t)y[bit >> 3] & ~mask;
    y[bit >> 3] = (int8_t)(uint8_t)(others | ((code * (1 << (bit & 7))) & mask));
}

/* ---- layers; low and high are the bounds of the output's codes ---- */

typedef struct {
    int32_t in_height, in_width, in_channels, out_height, out_width, out_channels, groups;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high, x_bits, y_bits;
    const int8_t *weight;             /* (out_channels, kernel_height, kernel_width, in_channels / groups) */
    const int32_t *bias;              /* (out_channels), less x_zero_point * sum of weights */
    const float *rescale;             /* (out_channels) */
    const int32_t *weight_zero_point; /* (out_channels), optional */
} planish_conv2d_layer;

/* scratch: 2 * kernel_height * kernel_width * in_channels / groups bytes, for the windows of two pixels; bits: of packed codes */
void planish_conv2d(const planish_conv2d_layer *layer, const int8_t *x, int8_t *y, int8_t *scratch);

/* a 1 x 1 kernel without padding on codes of 8 bits, which needs no scratch */
typedef planish_conv2d_layer planish_pointwise_conv2d_layer;

void planish_pointwise_conv2d(const planish_pointwise_conv2d_layer *layer, const int8_t *x, int8_t *y);

typedef struct {
    int32_t in_height, in_width, in_channels, out_height, out_width, multiplier;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high, x_bits, y_bits;
    const int8_t *weight;             /* (kernel_height, kernel_width, in_channels * multiplier) */
    const int32_t *bias;              /* (in_channels * multiplier) */
    const int32_t *folded_bias;       /* bias less x_zero_point * sum of weights */
    const float *rescale;             /* (in_channels * multiplier) */
    const int32_t *weight_zero_point; /* (in_channels * multiplier), optional */
} planish_depthwise_conv2d_layer;

void planish_depthwise_conv2d(const planish_depthwise_conv2d_layer *layer, const int8_t *x, int8_t *y);

typedef struct {
    int32_t rows, in_features, out_features, y_zero_point, low, high, x_bits, y_bits;
    const int8_t *weight;             /* (out_features, in_features) */
    const int32_t *bias;              /* (out_features), less x_zero_point * sum of weights */
    const float *rescale;             /* (out_features) */
    const int32_t *weight_zero_point; /* (out_features), optional */
} planish_fully_connected_layer;

void planish_fully_connected(const planish_fully_connected_layer *layer, const int8_t *x, int8_t *y);

/* the same for packed inputs; scratch: in_features bytes, for a row of codes */
typedef planish_fully_connected_layer planish_fully_connected_packed_layer;

void planish_fully_connected_packed(const planish_fully_connected_packed_layer *layer, const int8_t *x, int8_t *y,
                                    int8_t *scratch);

/* element i of a meets element i % operand_size of b */
typedef struct {
    int32_t size, operand_size;
    float ratio_a, ratio_b, fixed;
    int32_t low, high;
} planish_add_layer;

void planish_add(const planish_add_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    int32_t size, operand_size;
    float ratio_a, ratio_b, fixed;
    int32_t low, high;
    const int8_t *operand; /* b, (operand_size) */
} planish_add_constant_layer;

/* the same for packed codes of equally many elements */
typedef struct {
    int32_t size;
    float ratio_a, ratio_b, fixed;
    int32_t low, high, a_bits, b_bits, y_bits;
} planish_add_packed_layer;

void planish_add_packed(const planish_add_packed_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

void planish_add_constant(const planish_add_constant_layer *layer, const int8_t *a, int8_t *y);

typedef struct {
    int32_t size, operand_size, a_zero_point, b_zero_point, y_zero_point;
    float rescale;
    int32_t low, high;
} planish_mul_layer;

void planish_mul(const planish_mul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y);

typedef struct {
    int32_t size, operand_size, a_zero_point, b_zero_point, y_zero_point;
    float rescale;
    int32_t low, high;
    const int8_t *operand; /* b, (operand_size) */
} planish_mul_constant_layer;

void planish_mul_constant(const planish_mul_constant_layer *layer, const int8_t *a, int8_t *y);

typedef struct {
    int32_t pixels, channels, x_zero_point, y_zero_point, low, high;
    float rescale;
} planish_global_average_pool_layer;

void planish_global_average_pool(const planish_global_average_pool_layer *layer, const int8_t *x, int8_t *y);

typedef struct {
    int32_t in_height, in_width, channels, out_height, out_width;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    int32_t x_zero_point, y_zero_point, low, high;
    int32_t include_pad; /* 1: divide by all taps, 0: by those inside the image */
    float x_scale, y_scale;
} planish_average_pool_layer;

void planish_average_pool(const planish_average_pool_layer *layer, const int8_t *x, int8_t *y);

typedef struct {
    int32_t in_height, in_width, channels, out_height, out_width;
    int32_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width, pad_top, pad_left;
    const int8_t *table; /* (256), applied to the maximum, optional */
} planish_max_pool_layer;

void planish_max_pool(const planish_max_pool_layer *layer, const int8_t *x, int8_t *y);

/* copies a box; sizes and strides of up to 6 dimensions, outermost first, in elements of memory */
typedef struct {
    int32_t dimensions, offset;
    const int32_t *sizes;   /* (dimensions), of the output */
    const int32_t *strides; /* (dimensions), in the input, may be negative */
    const int8_t *table;    /* (256), optional */
} planish_strided_copy_layer;

void planish_strided_copy(const planish_strided_copy_layer *layer, const int8_t *x, int8_t *y);

/* copies `rows` runs of `width` bytes, which begin `x_stride` and `y_stride` bytes apart; what is between them stays */
typedef struct {
    int32_t rows, width, x_offset, x_stride, y_offset, y_stride;
} planish_copy_block_layer;

void planish_copy_block(const planish_copy_block_layer *layer, const int8_t *x, int8_t *y);

/* the output is filled with `value`, then the input's box is copied into it */
typedef struct {
    int32_t dimensions, size, x_offset, y_offset, value;
    const int32_t *sizes;     /* (dimensions), of the box */
    const int32_t *x_strides; /* (dimensions), in the input; the last is 1 */
    const int32_t *y_strides; /* (dimensions), in the output; the last is 1 */
    const int8_t *table;      /* (256), optional */
} planish_pad_layer;

void planish_pad(const planish_pad_layer *layer, const int8_t *x, int8_t *y);

/* `outer` times: `widths[i]` codes of every input i, through tables[i] (256) where mapped[i] */
typedef struct {
    int32_t inputs, outer;
    const int32_t *widths;   /* (inputs) */
    const int32_t *mapped;   /* (inputs), index of the input's table, or -1 */
    const int8_t *tables;    /* (number of tables, 256), optional */
} planish_concat_layer;

void planish_concat(const planish_concat_layer *layer, const int8_t *const *x, int8_t *y);

typedef struct {
    int32_t size;
    const int8_t *table; /* (256) */
} planish_lookup_layer;

void planish_lookup(const planish_lookup_layer *layer, const int8_t *x, int8_t *y);

typedef struct {
    int32_t size, low, high;
} planish_clamp_codes_layer;

void planish_clamp_codes(const planish_clamp_codes_layer *layer, const int8_t *x, int8_t *y);

/* a tensor of `channels` by `pixels` from one of other dimensions, both in ONNX order */
typedef struct {
    int32_t in_channels, in_pixels, out_channels, out_pixels;
    const int8_t *table; /* (256), optional */
} planish_reshape_layer;

void planish_reshape(const planish_reshape_layer *layer, const int8_t *x, int8_t *y);

/* softmax over `size` elements that lie `inner` apart, for `outer` x `inner` of them */
typedef struct {
    int32_t outer, size, inner, y_zero_point, low, high;
    float inverse_scale;
    const float *exponentials; /* (256), of the largest code less 255, 254, ..., 0 */
} planish_softmax_layer;

void planish_softmax(const planish_softmax_layer *layer, const int8_t *x, int8_t *y);

/* layer normalization of `rows` of `size` codes */
typedef struct {
    int32_t rows, size, y_zero_point, low, high;
    float epsilon;      /* in squared codes, times size^2 */
    const float *gain;  /* (size) */
    const float *shift; /* (size) */
} planish_layer_norm_layer;

void planish_layer_norm(const planish_layer_norm_layer *layer, const int8_t *x, int8_t *y);

/* `batches` times a (rows, depth) by b (depth, columns); offset and steps in memory of each, from batch to batch, from row to row and
 * from column to column */
typedef struct {
    int32_t batches, rows, columns, depth;
    int32_t a_offset, a_batch, a_row, a_column;
    int32_t b_offset, b_batch, b_row, b_column;
    int32_t y_offset, y_batch, y_row, y_column;
    int32_t a_zero_point, b_zero_point, y_zero_point, low, high;
    float rescale;
} planish_matmul_layer;

/* scratch: 8 * depth bytes, a multiple of 4 as its address */
void planish_matmul(const planish_matmul_layer *layer, const int8_t *a, const int8_t *b, int8_t *y, int8_t *scratch);

#ifdef __cplusplus
}
#endif

#endif
