/* Depthwise convolution, multiplier 1, one channel after another, two pixels of a row at a time.
 *
 * A channel's rows come into scratch as words x[i] + x[i + COLUMN_STRIDE] * 2^16, with their padding: one product with a
 * weight then serves two neighbouring outputs. As many rows as the kernel has are kept. The products of a row of the kernel
 * are summed before the sums are taken apart, or two of them where the channel's weights are too large for that:
 *
 *     second += (sum >> 16) + (bit 15 of sum)      both += sum      first = both - second * 2^16
 *
 * Constants: KERNEL_ROWS, KERNEL_COLUMNS (1 to 5), COLUMN_STRIDE (1 or 2), WEIGHT_BITS, and those of code.h.
 */
#include "armv6m/depthwise_conv2d.h"

void PLANISH_KERNEL(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch);

/* what a row of outputs needs: the assembler knows this order */
typedef struct {
    const int32_t *rows[KERNEL_ROWS];
    uint32_t half, limit;
    int8_t *y;
    int32_t y_step;
    uint32_t before;
    int32_t bias;
    uint32_t word;
    int32_t low, high;
    const planish_scale *scale;
    uint32_t window;
    int32_t end; /* bytes of words in which the pairs of outputs begin */
    const int32_t *weight;
    int32_t odd;     /* 1: half a pair more */
    int32_t fill[5]; /* words are copied by fives */
} row_t;

#if defined(__ARM_ARCH_6M__)
#define HALF (4 * KERNEL_ROWS)
#define LIMIT (HALF + 4)
#define Y (HALF + 8)
#define Y_STEP (HALF + 12)
#define BEFORE_BITS (HALF + 16)
#define BIAS (HALF + 20)
#define WORD (HALF + 24)
#define LOW (HALF + 28)
#define HIGH (HALF + 32)
#define SCALE (HALF + 36)
#define WINDOW (HALF + 40)
#define END (HALF + 44)
#define WEIGHT (HALF + 48)
#define ODD (HALF + 52)
#define FIVES ((KERNEL_ROWS + 18) / 5)
#define FRAME ((FIVES * 20 + 7) / 8 * 8)
#include "armv6m/code.h"

/* r1 offset of the words, r2 weights; r4 to r6 words, then products; r3 free; r7 second, r8 both */
#define BEGIN(k) "ldr r0, [sp, #4*" #k "]\n adds r0, r1\n"
#define PRODUCT(x, k, j) "ldr r3, [r2, #4*(" TEXT(KERNEL_COLUMNS) "*" #k "+" #j ")]\n muls " x ", r3\n"
#define SPLIT(x) "add r8, " x "\n asrs " x ", " x ", #16\n adcs r7, " x "\n"
#define TWO(k, j) PRODUCT("r4", k, j) PRODUCT("r5", k, j + 1) "adds r4, r5\n"
#if KERNEL_COLUMNS == 1
#define ROW(k) BEGIN(k) "ldr r4, [r0]\n" PRODUCT("r4", k, 0) SPLIT("r4")
#define PARTS(k) ROW(k)
#elif KERNEL_COLUMNS == 2
#define ROW(k) BEGIN(k) "ldmia r0!, {r4, r5}\n" TWO(k, 0) SPLIT("r4")
#define PARTS(k) ROW(k)
#elif KERNEL_COLUMNS == 3
#define ROW(k) BEGIN(k) "ldmia r0!, {r4, r5, r6}\n" TWO(k, 0) PRODUCT("r6", k, 2) "adds r4, r6\n" SPLIT("r4")
#define PARTS(k) BEGIN(k) "ldmia r0!, {r4, r5, r6}\n" TWO(k, 0) SPLIT("r4") PRODUCT("r6", k, 2) SPLIT("r6")
#elif KERNEL_COLUMNS == 4
#define ROW(k)                                                                                                         \
    BEGIN(k) "ldmia r0!, {r4, r5, r6}\n" TWO(k, 0) PRODUCT("r6", k, 2) "adds r4, r6\n ldr r5, [r0]\n"                   \
        PRODUCT("r5", k, 3) "adds r4, r5\n" SPLIT("r4")
#define PARTS(k) BEGIN(k) "ldmia r0!, {r4, r5}\n" TWO(k, 0) SPLIT("r4") "ldmia r0!, {r4, r5}\n" TWO(k, 2) SPLIT("r4")
#else
#define ROW(k)                                                                                                         \
    BEGIN(k) "ldmia r0!, {r4, r5, r6}\n" TWO(k, 0) PRODUCT("r6", k, 2) "adds r4, r6\n ldmia r0!, {r5, r6}\n"            \
        PRODUCT("r5", k, 3) "adds r4, r5\n" PRODUCT("r6", k, 4) "adds r4, r6\n" SPLIT("r4")
#define PARTS(k)                                                                                                       \
    BEGIN(k) "ldmia r0!, {r4, r5}\n" TWO(k, 0) SPLIT("r4") "ldmia r0!, {r4, r5, r6}\n" TWO(k, 2) SPLIT("r4")            \
        PRODUCT("r6", k, 4) SPLIT("r6")
#endif
#if KERNEL_ROWS == 1
#define ALL(row) row(0)
#elif KERNEL_ROWS == 2
#define ALL(row) row(0) row(1)
#elif KERNEL_ROWS == 3
#define ALL(row) row(0) row(1) row(2)
#elif KERNEL_ROWS == 4
#define ALL(row) row(0) row(1) row(2) row(3)
#else
#define ALL(row) row(0) row(1) row(2) row(3) row(4)
#endif
#if BEFORE
#define SHIFT "ldr r7, [sp, #" TEXT(BEFORE_BITS) "]\n lsls r0, r7\n lsls r2, r7\n"
#define UNSHIFT "ldr r5, [sp, #" TEXT(BEFORE_BITS) "+16]\n asrs r0, r5\n"
#else
#define SHIFT
#define UNSHIFT
#endif

/* a row of outputs of one channel */
#define OUTPUTS(name, row)                                                                                             \
    __attribute__((naked, noinline)) static void name(const row_t *p __attribute__((unused)))                          \
    {                                                                                                                  \
        __asm__(".syntax unified\n"                                                                                    \
                "push {r4, r5, r6, r7, lr}\n mov r4, r8\n mov r5, r9\n mov r6, r10\n push {r4, r5, r6}\n"              \
                "sub sp, #" TEXT(FRAME) "\n mov r1, sp\n"                                                              \
                ".rept " TEXT(FIVES) "\n ldmia r0!, {r3, r4, r5, r6, r7}\n stmia r1!, {r3, r4, r5, r6, r7}\n .endr\n"  \
                "ldr r2, [sp, #" TEXT(WEIGHT) "]\n ldr r7, [sp, #" TEXT(WINDOW) "]\n mov r12, r7\n movs r1, #0\n"      \
                "1: movs r7, #0\n mov r8, r7\n" ALL(row) "adds r1, #8*" TEXT(COLUMN_STRIDE) "\n"                       \
                "mov r0, r7\n mov r2, r8\n lsls r3, r0, #16\n subs r2, r2, r3\n" /* r0 second, r2 first */             \
                "ldr r3, [sp, #" TEXT(BIAS) "]\n ldr r4, [sp, #" TEXT(WORD) "]\n adds r0, r3\n adds r2, r3\n"          \
                "mov r9, r0\n" SHIFT                                                                                   \
                "lsrs r6, r4, #16\n ldr r5, [sp, #" TEXT(HALF) "]\n ldr r3, [sp, #" TEXT(LIMIT) "]\n"                  \
                CODE("r2", "0") CODE("r0", "1")                                                                        \
                "ldr r7, [sp, #" TEXT(Y) "]\n ldr r3, [sp, #" TEXT(Y_STEP) "]\n strb r0, [r7, r3]\n strb r2, [r7]\n"   \
                "adds r7, r3\n adds r7, r3\n str r7, [sp, #" TEXT(Y) "]\n"                                             \
                "ldr r2, [sp, #" TEXT(WEIGHT) "]\n ldr r3, [sp, #" TEXT(END) "]\n cmp r1, r3\n beq 2f\n b 1b\n"        \
                "2: ldr r3, [sp, #" TEXT(ODD) "]\n cmp r3, #0\n beq 3f\n movs r3, #0\n" /* the second code goes first */ \
                "str r3, [sp, #" TEXT(ODD) "]\n str r3, [sp, #" TEXT(Y_STEP) "]\n"                                     \
                "ldr r3, [sp, #" TEXT(END) "]\n adds r3, #8*" TEXT(COLUMN_STRIDE) "\n str r3, [sp, #" TEXT(END) "]\n b 1b\n" \
                "3: add sp, #" TEXT(FRAME) "\n pop {r4, r5, r6}\n mov r8, r4\n mov r9, r5\n mov r10, r6\n"             \
                "pop {r4, r5, r6, r7, pc}\n"                                                                           \
                SATURATED("r2", "0") SATURATED("r0", "1")                                                              \
                "220: push {r0, r1, r3, r5}\n mov r1, r4\n" UNSHIFT                                                    \
                "ldr r3, [sp, #" TEXT(BIAS) "+16]\n subs r0, r0, r3\n lsls r0, r0, #16\n mov r2, r8\n"                 \
                "subs r0, r2, r0\n adds r0, r0, r3\n ldr r2, [sp, #" TEXT(SCALE) "+16]\n bl planish_exact_code\n"      \
                "mov r2, r0\n pop {r0, r1, r3, r5}\n ldr r7, [sp, #" TEXT(WINDOW) "]\n mov r12, r7\n b 230b\n"         \
                "221: push {r1, r2, r3, r4}\n mov r0, r9\n mov r1, r4\n ldr r2, [sp, #" TEXT(SCALE) "+16]\n"           \
                "bl planish_exact_code\n pop {r1, r2, r3, r4}\n"                                                       \
                "ldr r7, [sp, #" TEXT(WINDOW) "]\n mov r12, r7\n b 231b\n");                                           \
    }
OUTPUTS(outputs_of, ROW)
OUTPUTS(outputs_in_parts, PARTS)
#else
static void outputs(const row_t *p, int32_t taps)
{
    int32_t pair, k, i, j, pairs = p->end / (8 * COLUMN_STRIDE) + p->odd;
    int8_t *y = p->y;
    for (pair = 0; pair < pairs; pair++) {
        uint32_t second = 0, both = 0;
        int32_t y_step = p->odd && pair == pairs - 1 ? 0 : p->y_step;
        for (k = 0; k < KERNEL_ROWS; k++) {
            const int32_t *words = p->rows[k] + pair * 2 * COLUMN_STRIDE;
            for (i = 0; i < KERNEL_COLUMNS; i += taps) {
                uint32_t sum = 0;
                for (j = i; j < i + taps && j < KERNEL_COLUMNS; j++) {
                    sum += (uint32_t)words[j] * (uint32_t)p->weight[k * KERNEL_COLUMNS + j];
                }
                both += sum;
                second += (uint32_t)((int32_t)sum >> 16) + (sum >> 15 & 1u);
            }
        }
        y[y_step] = (int8_t)planish_code((int32_t)second + p->bias, p->word, p->scale);
        y[0] = (int8_t)planish_code((int32_t)(both - (second << 16)) + p->bias, p->word, p->scale);
        y += 2 * y_step;
    }
}

static void outputs_of(const row_t *p)
{
    outputs(p, KERNEL_COLUMNS);
}

static void outputs_in_parts(const row_t *p)
{
    outputs(p, 2);
}
#endif

/* the words of a row of one channel, `size` of them. COLUMN_STRIDE words before it are written too */
static void words_of(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int32_t *to, int32_t size)
{
    int32_t zero = l->x_zero_point, step = l->in_column_step, inside = size + COLUMN_STRIDE - l->pad_columns, i;
#if COLUMN_STRIDE == 1
    uint32_t a = (uint32_t)zero;
#define PUT(code) (*to++ = (int32_t)(a + ((uint32_t)(code) << 16)), a = (uint32_t)(code))
#else
    uint32_t a = (uint32_t)zero, b = (uint32_t)zero;
#define PUT(code) (*to++ = (int32_t)(a + ((uint32_t)(code) << 16)), a = b, b = (uint32_t)(code))
#endif
    int32_t *end = to + size;
    to -= COLUMN_STRIDE;
    inside = inside < l->in_columns ? inside : l->in_columns;
    for (i = 0; i < l->pad_columns; i++) {
        PUT(zero);
    }
    for (i = inside >> 1; i > 0; i--) {
        int32_t first = x[0], second = x[step];
        PUT(first);
        PUT(second);
        x += 2 * step;
    }
    if (inside & 1) {
        int32_t last = *x;
        PUT(last);
    }
    while (to < end) {
        PUT(zero);
    }
}

/* the channel's weights as words; whether the products of a row of the kernel always fit 16 bits */
static int weights_of(const uint8_t *from, int32_t *to)
{
    int fit = 1;
    int32_t k, j;
    uint32_t bits = 0;
    for (k = 0; k < KERNEL_ROWS; k++) {
        int32_t sum = 0;
        for (j = 0; j < KERNEL_COLUMNS; j++) {
            int32_t w = (int32_t)((uint32_t)from[bits >> 3] >> (bits & 7u) << (32 - WEIGHT_BITS)) >> (32 - WEIGHT_BITS);
            bits += WEIGHT_BITS;
            *to++ = w;
            sum += w < 0 ? -w : w;
        }
        fit = fit && sum <= 255;
    }
    return fit;
}

void PLANISH_KERNEL(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    enum { WEIGHT_BYTES = (KERNEL_ROWS * KERNEL_COLUMNS * WEIGHT_BITS + 7) / 8 };
    int32_t weight[KERNEL_ROWS * KERNEL_COLUMNS];
    int32_t pairs = (l->out_columns + 1) >> 1;
    int32_t size = (pairs - 1) * 2 * COLUMN_STRIDE + KERNEL_COLUMNS;
    int32_t *padding = (int32_t *)(void *)scratch, *slots = padding + size + COLUMN_STRIDE;
    const int32_t *channel = l->channel;
    const uint8_t *packed = l->weight;
    row_t p = {0};
    int32_t c, row, i, k;
    for (i = 0; i < size; i++) {
        padding[i] = (int32_t)((uint32_t)l->x_zero_point * 65537u);
    }
    p.half = l->scale.half;
    p.limit = l->scale.limit;
    p.before = l->scale.before;
    p.low = l->scale.low;
    p.high = l->scale.high;
    p.scale = &l->scale;
    p.window = l->scale.window;
    p.end = (l->out_columns >> 1) * 8 * COLUMN_STRIDE;
    p.odd = l->out_columns & 1;
    p.weight = weight;
    p.y_step = l->out_column_step;
    for (c = 0; c < l->channels; c++) {
        int fit = weights_of(packed, weight);
        int32_t slot = 0, fresh = KERNEL_ROWS; /* of the kernel's rows the last ones, which are not in scratch yet */
        packed += WEIGHT_BYTES;
        p.bias = *channel++;
        p.word = (uint32_t)*channel++;
        for (row = 0; row < l->out_rows; row++) {
            for (k = 0; k < KERNEL_ROWS; k++) {
                int32_t in_row = row * l->row_stride - l->pad_rows + k;
                if (k < KERNEL_ROWS - fresh) {
                    p.rows[k] = p.rows[k + l->row_stride];
                    continue;
                }
                if ((uint32_t)in_row >= (uint32_t)l->in_rows) {
                    p.rows[k] = padding;
                    continue;
                }
                p.rows[k] = slots + slot * (size + COLUMN_STRIDE) + COLUMN_STRIDE;
                words_of(l, x + c + in_row * l->in_row_step, slots + slot * (size + COLUMN_STRIDE) + COLUMN_STRIDE, size);
                slot = slot + 1 == KERNEL_ROWS ? 0 : slot + 1;
            }
            fresh = l->row_stride < KERNEL_ROWS ? l->row_stride : KERNEL_ROWS;
            p.y = y + c + row * l->out_row_step;
            if (fit) {
                outputs_of(&p);
            } else {
                outputs_in_parts(&p);
            }
        }
    }
}
