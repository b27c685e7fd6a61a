/* Depthwise convolution, multiplier 1, one channel after another, two pixels of a row at a time.
 *
 * A channel's rows come into scratch as words x[i] + x[i + COLUMN_STRIDE] * 2^16, with their padding: one product with a
 * weight then serves two neighbouring outputs. As many rows as the kernel has are kept. The products of a row of the kernel
 * are summed before the sums are taken apart, or two of them where the channel's weights are too large for that:
 *
 *     second += (sum >> 16) + (bit 15 of sum)      both += sum      first = both - second * 2^16
 *
 * Constants: KERNEL_ROWS, KERNEL_COLUMNS (1 to 5), COLUMN_STRIDE (1 or 2), and those of code.h.
 */
#include "armv6m/depthwise_conv2d.h"

void PLANISH_KERNEL(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch);

#if defined(__ARM_ARCH_6M__)
#define HALF 0 /* places in planish_depthwise_row */
#define LIMIT 4
#define Y 8
#define Y_STEP 12
#define BEFORE_BITS 16
#define BIAS 20
#define WORD 24
#define LOW 28
#define HIGH 32
#define SCALE 36
#define WINDOW 40
#define END 44
#define WEIGHT 48
#define ODD 52
#define FRAME 80
#include "armv6m/code.h"

/* r1 offset of the words, r2 weights; r4 to r6 words, then products; r3 free; r7 second, r8 both */
#define BEGIN(k) "ldr r0, [sp, #4*" #k "+56]\n adds r0, r1\n"
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
    __attribute__((naked, noinline)) static void name(const planish_depthwise_row *p __attribute__((unused)))                          \
    {                                                                                                                  \
        __asm__(".syntax unified\n"                                                                                    \
                "push {r4, r5, r6, r7, lr}\n mov r4, r8\n mov r5, r9\n mov r6, r10\n push {r4, r5, r6}\n"              \
                "sub sp, #" TEXT(FRAME) "\n mov r1, sp\n"                                                              \
                ".rept 4\n ldmia r0!, {r3, r4, r5, r6, r7}\n stmia r1!, {r3, r4, r5, r6, r7}\n .endr\n"  \
                "ldr r2, [sp, #" TEXT(WEIGHT) "]\n ldr r7, [sp, #" TEXT(WINDOW) "]\n mov r12, r7\n movs r1, #0\n"      \
                "ldr r3, [sp, #" TEXT(END) "]\n cmp r3, #0\n bne 1f\n b 2f\n" /* a single output: no pair */          \
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
static void outputs(const planish_depthwise_row *p, int32_t taps)
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

static void outputs_of(const planish_depthwise_row *p)
{
    outputs(p, KERNEL_COLUMNS);
}

static void outputs_in_parts(const planish_depthwise_row *p)
{
    outputs(p, 2);
}
#endif

void PLANISH_KERNEL(const planish_armv6m_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    planish_armv6m_depthwise(l, x, y, scratch, outputs_of, outputs_in_parts);
}
