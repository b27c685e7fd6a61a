/* The outputs of two pixels (pairs.h), for one kind of weights. Constants: WEIGHT_BITS and TAPS of a chunk (8 bits: 2, 3, 4 or 8;
 * 4 bits: 8; 2 bits: 16), EXTRA (there are extra chunks), UNROLL (chunks in the loop: 8, 4 or 2, or all there are), LOOPS (there
 * are more), SKIPS (they are no multiple of it), and those of code.h.
 */
#include "armv6m/conv2d.h"

#define CHUNK_WORDS (TAPS + 1)
#define CHUNK_BYTES (TAPS * WEIGHT_BITS / 8)
#if TAPS == 2
#define CHUNK_CODE 20 /* bytes of CHUNK's instructions */
#define EXPAND planish_armv6m_expand_8x2
#elif TAPS == 3
#define CHUNK_CODE 26
#define EXPAND planish_armv6m_expand_8x3
#elif TAPS == 4
#define CHUNK_CODE 32
#define EXPAND planish_armv6m_expand_8x4
#elif TAPS == 16
#define CHUNK_CODE 110
#define EXPAND planish_armv6m_expand_2x16
#else
#define CHUNK_CODE 58
#if WEIGHT_BITS == 8
#define EXPAND planish_armv6m_expand_8x8
#else
#define EXPAND planish_armv6m_expand_4x8
#endif
#endif

void PLANISH_KERNEL(const planish_armv6m_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch);

#if defined(__ARM_ARCH_6M__)
#define LOW 52 /* of planish_pairs */
#define HIGH 56
#include "armv6m/code.h"

/* r0 words, r1 weights, r3 sum; r2, r4 to r7 free; r8 second, r9 both */
#define SPLIT "add r9, r3\n asrs r3, r3, #16\n add r8, r3\n"
#if WEIGHT_BITS == 8
#define TAP(x, k) "ldrb r2, [r1, #" #k "]\n muls " x ", r2\n adds r3, " x "\n"
#if TAPS == 2
#define CHUNK(k) "ldmia r0!, {r3, r4, r5}\n" TAP("r4", 2*k) TAP("r5", 2*k+1) SPLIT
#elif TAPS == 3
#define CHUNK(k) "ldmia r0!, {r3, r4, r5, r6}\n" TAP("r4", 3*k) TAP("r5", 3*k+1) TAP("r6", 3*k+2) SPLIT
#elif TAPS == 4
#define CHUNK(k)                                                                                                       \
    "ldmia r0!, {r3, r4, r5, r6, r7}\n" TAP("r4", 4*k) TAP("r5", 4*k+1) TAP("r6", 4*k+2) TAP("r7", 4*k+3) SPLIT
#else
#define CHUNK(k)                                                                                                       \
    "ldmia r0!, {r3, r4, r5, r6, r7}\n" TAP("r4", 8*k) TAP("r5", 8*k+1) TAP("r6", 8*k+2) TAP("r7", 8*k+3)               \
    "ldmia r0!, {r4, r5, r6, r7}\n" TAP("r4", 8*k+4) TAP("r5", 8*k+5) TAP("r6", 8*k+6) TAP("r7", 8*k+7) SPLIT
#endif
#else
#define TAP(x) "muls " x ", r2\n adds r3, " x "\n"
#define NEXT(x) "lsrs r2, r2, #" TEXT(WEIGHT_BITS) "\n" TAP(x)
#define FOUR "ldmia r0!, {r4, r5, r6, r7}\n" NEXT("r4") NEXT("r5") NEXT("r6") NEXT("r7")
#define BEGIN(k)                                                                                                       \
    "ldmia r0!, {r3, r4, r5, r6, r7}\n ldr r2, [r1, #4*" #k "]\n" TAP("r4") NEXT("r5") NEXT("r6") NEXT("r7") FOUR
#if TAPS == 8
#define CHUNK(k) BEGIN(k) SPLIT
#else
#define CHUNK(k) BEGIN(k) FOUR FOUR SPLIT
#endif
#endif
#if UNROLL == 1
#define CHUNKS CHUNK(0)
#elif UNROLL == 2
#define CHUNKS CHUNK(0) CHUNK(1)
#elif UNROLL == 3
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2)
#elif UNROLL == 4
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3)
#elif UNROLL == 5
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4)
#elif UNROLL == 6
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4) CHUNK(5)
#elif UNROLL == 7
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4) CHUNK(5) CHUNK(6)
#else
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4) CHUNK(5) CHUNK(6) CHUNK(7)
#endif

/* entry and window in their registers */
#define AGAIN "ldr r7, [sp, #44]\n mov lr, r7\n ldr r7, [sp, #48]\n mov r12, r7\n"

/* for every output: dot products, requantization, two stores */
__attribute__((naked, noinline)) static void outputs_of(const planish_pairs *p __attribute__((unused)))
{
    __asm__(".syntax unified\n"
            "push {r4, r5, r6, r7, lr}\n"
            "mov r4, r8\n mov r5, r9\n mov r6, r10\n mov r7, r11\n"
            "push {r4, r5, r6, r7}\n"
            "sub sp, #60\n"
            "mov r1, sp\n"
            "ldmia r0!, {r2, r3, r4, r5, r6}\n stmia r1!, {r2, r3, r4, r5, r6}\n"
            "ldmia r0!, {r2, r3, r4, r5, r6}\n stmia r1!, {r2, r3, r4, r5, r6}\n"
            "ldmia r0!, {r2, r3, r4, r5, r6}\n stmia r1!, {r2, r3, r4, r5, r6}\n"
            "mov lr, r3\n mov r12, r4\n" /* entry, window */
            "ldmia r0!, {r2, r3, r4}\n"
            "mov r11, r2\n mov r10, r3\n mov r1, r4\n" /* channel, words_end, weight */

            "1: ldr r0, [sp, #0]\n"
            "ldr r2, [sp, #20]\n mov r9, r2\n movs r2, #0\n mov r8, r2\n"
#if SKIPS
            "ldr r2, [sp, #24]\n subs r1, r1, r2\n"
            "add pc, lr\n nop\n"
#endif
            "2:\n" CHUNKS "adds r1, #" TEXT(UNROLL) "*" TEXT(CHUNK_BYTES) "\n"
#if LOOPS
            "cmp r0, r10\n beq 3f\n b 2b\n"
#endif
            "3:\n"
#if EXTRA
            "ldr r7, [sp, #28]\n ldrb r0, [r7]\n adds r7, #1\n str r7, [sp, #28]\n cmp r0, #255\n bne 10f\n"
            "4:\n"
#endif
            "mov r0, r8\n mov r2, r9\n lsls r3, r0, #16\n subs r2, r2, r3\n" /* r0 second, r2 first */
            "mov r7, r11\n ldmia r7!, {r3, r4}\n mov r11, r7\n"
            "adds r0, r3\n adds r2, r3\n"
#if BEFORE
            "ldr r5, [sp, #16]\n lsls r0, r5\n lsls r2, r5\n"
#endif
            "lsrs r6, r4, #16\n ldr r5, [sp, #12]\n ldr r3, [sp, #32]\n" /* mantissa, half, limit */
            CODE("r2", "0") CODE("r0", "1")
            "ldr r7, [sp, #4]\n strb r2, [r7]\n ldr r3, [sp, #8]\n strb r0, [r7, r3]\n adds r7, #1\n str r7, [sp, #4]\n"
            "ldr r3, [sp, #40]\n cmp r3, r11\n beq 5f\n b 1b\n"

            "5: add sp, #60\n"
            "pop {r4, r5, r6, r7}\n mov r8, r4\n mov r9, r5\n mov r10, r6\n mov r11, r7\n"
            "pop {r4, r5, r6, r7, pc}\n"
#if EXTRA
            "10: mov r12, r1\n mov r1, r7\n"
            "11: movs r2, #4*" TEXT(CHUNK_WORDS) "\n muls r0, r2\n ldr r2, [sp, #0]\n adds r0, r2\n" CHUNK(0)
            "movs r2, #1\n lsls r2, r2, #15\n mov r3, r9\n subs r3, r3, r2\n mov r9, r3\n"
            "adds r1, #" TEXT(TAPS) "\n ldrb r0, [r1]\n adds r1, #1\n cmp r0, #255\n bne 11b\n"
            "str r1, [sp, #28]\n mov r1, r12\n ldr r7, [sp, #48]\n mov r12, r7\n b 4b\n"
#endif
            SATURATED("r2", "0") SATURATED("r0", "1")
            "220: push {r0, r1, r3, r4}\n" /* first = both - second * 2^16 + bias */
            "mov r0, r9\n mov r1, r8\n lsls r1, r1, #16\n subs r0, r0, r1\n"
            "bl 6f\n mov r2, r0\n pop {r0, r1, r3, r4}\n" AGAIN "b 230b\n"
            "221: push {r1, r2, r3, r4}\n mov r0, r8\n"
            "bl 6f\n pop {r1, r2, r3, r4}\n" AGAIN "b 231b\n"
            "6: push {r4, lr}\n mov r1, r11\n subs r1, #8\n ldr r1, [r1]\n adds r0, r0, r1\n"
            "mov r1, r4\n ldr r2, [sp, #60]\n bl planish_exact_code\n pop {r4, pc}\n");
}
#else
static const uint8_t *add_chunk(const int32_t *words, const uint8_t *weight, uint32_t *second, uint32_t *both)
{
    uint32_t sum = (uint32_t)words[0];
    int32_t k;
#if WEIGHT_BITS == 8
    for (k = 0; k < TAPS; k++) {
        sum += (uint32_t)words[1 + k] * weight[k];
    }
#else
    uint32_t packed = weight[0] | (uint32_t)weight[1] << 8 | (uint32_t)weight[2] << 16 | (uint32_t)weight[3] << 24;
    for (k = 0; k < TAPS; k++) {
        sum += (uint32_t)words[1 + k] * (packed >> WEIGHT_BITS * k);
    }
#endif
    *both += sum;
    *second += (uint32_t)((int32_t)sum >> 16);
    return weight + CHUNK_BYTES;
}

static void outputs_of(const planish_pairs *p)
{
    const int32_t *words, *channel;
    const uint8_t *weight = p->weight, *extra = p->extra;
    int8_t *y = p->y;
    for (channel = p->channel; channel != p->channel_end; channel += 2) {
        uint32_t second = 0, both = (uint32_t)p->start, first;
        for (words = p->words; words != p->words_end; words += CHUNK_WORDS) {
            weight = add_chunk(words, weight, &second, &both);
        }
#if EXTRA
        for (; *extra != 255; both -= 32768u) {
            words = p->words + *extra * CHUNK_WORDS;
            extra = add_chunk(words, extra + 1, &second, &both);
        }
        extra++;
#else
        (void)extra;
#endif
        first = both - (second << 16);
        y[0] = (int8_t)planish_code((int32_t)first + channel[0], (uint32_t)channel[1], p->scale);
        y[p->y_step] = (int8_t)planish_code((int32_t)second + channel[0], (uint32_t)channel[1], p->scale);
        y++;
    }
}
#endif

void PLANISH_KERNEL(const planish_armv6m_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    planish_armv6m_convolve(l, x, y, scratch, EXPAND, outputs_of, SKIPS * ((0 - l->chunks) & (UNROLL - 1)), CHUNK_BYTES, CHUNK_CODE);
}
