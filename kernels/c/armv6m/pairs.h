/* Dot products of two pixels at once.
 *
 * A word holds the codes of two pixels, a + b * 2^16, so that one product with a weight serves both. A chunk of TAPS products is
 * summed before the sums are taken apart; the weights are such that no sum of a chunk leaves 16 bits. Weights are stored
 * plus 128 (only unsigned bytes load with an offset), and every chunk of words starts with what takes that back:
 *
 *     start = 2^15 - 128 * (sum of the chunk's words)        sum = start + word * weight + ...
 *     second += sum >> 16                                    2^15 makes the low half positive: nothing is borrowed
 *     both   += sum                                          first = both - second * 2^16 - chunks * 2^15
 *
 * Chunks with heavier weights are stored with a part of them; the rest comes as `extra` chunks on the same words.
 */
#ifndef PLANISH_ARMV6M_PAIRS_H
#define PLANISH_ARMV6M_PAIRS_H

#include "armv6m/requantize.h"

#define CHUNK_WORDS (TAPS + 1)

#if TAPS == 2
#define UNROLL 8
#define CHUNK_CODE 20 /* bytes of CHUNK's instructions */
#elif TAPS == 4
#define UNROLL 8
#define CHUNK_CODE 32
#else
#define UNROLL 4
#define CHUNK_CODE 58
#endif

/* what the loop over outputs needs: the assembler knows this order */
typedef struct {
    const int32_t *words;
    int8_t *y;
    int32_t y_step; /* from the first pixel to the second */
    uint32_t half, before;
    int32_t start;    /* - chunks * 2^15 */
    int32_t skipped;  /* bytes of weights before the first chunk in the unrolled loop */
    const uint8_t *extra;
    uint32_t limit;
    const planish_scale *scale;
    const int32_t *channel_end;
    int32_t entry; /* bytes of code before the first chunk */
    uint32_t window;
    int32_t low, high;
    const int32_t *channel;
    const int32_t *words_end;
    const uint8_t *weight;
} pairs_t;

#if defined(__ARM_ARCH_6M__)
#define LOW 52 /* of pairs_t */
#define HIGH 56
#include "armv6m/code.h"

/* r0 words, r1 weights, r3 sum; r2, r4 to r7 free; r8 second, r9 both */
#define TAP(x, k) "ldrb r2, [r1, #" TEXT(k) "]\n muls " x ", r2\n adds r3, " x "\n"
#define SPLIT "add r9, r3\n asrs r3, r3, #16\n add r8, r3\n"
#if TAPS == 2
#define CHUNK(k) "ldmia r0!, {r3, r4, r5}\n" TAP("r4", 2 * k) TAP("r5", 2 * k + 1) SPLIT
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4) CHUNK(5) CHUNK(6) CHUNK(7)
#elif TAPS == 4
#define CHUNK(k)                                                                                                       \
    "ldmia r0!, {r3, r4, r5, r6, r7}\n" TAP("r4", 4 * k) TAP("r5", 4 * k + 1) TAP("r6", 4 * k + 2)                      \
        TAP("r7", 4 * k + 3) SPLIT
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3) CHUNK(4) CHUNK(5) CHUNK(6) CHUNK(7)
#else
#define CHUNK(k)                                                                                                       \
    "ldmia r0!, {r3, r4, r5, r6, r7}\n" TAP("r4", 8 * k) TAP("r5", 8 * k + 1) TAP("r6", 8 * k + 2)                      \
        TAP("r7", 8 * k + 3) "ldmia r0!, {r4, r5, r6, r7}\n" TAP("r4", 8 * k + 4) TAP("r5", 8 * k + 5)                  \
            TAP("r6", 8 * k + 6) TAP("r7", 8 * k + 7) SPLIT
#define CHUNKS CHUNK(0) CHUNK(1) CHUNK(2) CHUNK(3)
#endif

/* for every output: dot products, requantization, two stores */
__attribute__((naked, noinline)) static void outputs_of(const pairs_t *p __attribute__((unused)))
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
            "2:\n" CHUNKS "adds r1, #" TEXT(UNROLL * TAPS) "\n"
            "cmp r0, r10\n beq 3f\n b 2b\n"
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
            "lsrs r6, r4, #16\n ldr r5, [sp, #12]\n ldr r3, [sp, #32]\n" /* r6 mantissa, r5 half, r3 limit */
            CODE("r2", "0") CODE("r0", "1")
            "ldr r7, [sp, #4]\n strb r2, [r7]\n ldr r3, [sp, #8]\n strb r0, [r7, r3]\n adds r7, #1\n str r7, [sp, #4]\n"
            "ldr r3, [sp, #40]\n cmp r3, r11\n beq 5f\n b 1b\n"

            "5: add sp, #60\n"
            "pop {r4, r5, r6, r7}\n mov r8, r4\n mov r9, r5\n mov r10, r6\n mov r11, r7\n"
            "pop {r4, r5, r6, r7, pc}\n"
#if EXTRA
            "10: mov r12, r1\n mov r1, r7\n"
            "11: movs r2, #" TEXT(4 * CHUNK_WORDS) "\n muls r0, r2\n ldr r2, [sp, #0]\n adds r0, r2\n" CHUNK(0)
            "movs r2, #1\n lsls r2, r2, #15\n mov r3, r9\n subs r3, r3, r2\n mov r9, r3\n"
            "adds r1, #" TEXT(TAPS) "\n ldrb r0, [r1]\n adds r1, #1\n cmp r0, #255\n bne 11b\n"
            "str r1, [sp, #28]\n mov r1, r12\n ldr r7, [sp, #48]\n mov r12, r7\n b 4b\n"
#endif
            SATURATED("r2", "0") SATURATED("r0", "1")
            "220: push {r0, r1, r3, r4}\n" /* first = both - second * 2^16 + bias */
            "mov r0, r9\n mov r1, r8\n lsls r1, r1, #16\n subs r0, r0, r1\n"
            "mov r1, r11\n subs r1, #8\n ldr r1, [r1]\n adds r0, r0, r1\n"
            "mov r1, r4\n ldr r2, [sp, #52]\n bl planish_exact_code\n"
            "mov r2, r0\n pop {r0, r1, r3, r4}\n"
            "ldr r7, [sp, #44]\n mov lr, r7\n ldr r7, [sp, #48]\n mov r12, r7\n b 230b\n"
            "221: push {r1, r2, r3, r4}\n"
            "mov r0, r8\n mov r1, r11\n subs r1, #8\n ldr r1, [r1]\n adds r0, r0, r1\n"
            "mov r1, r4\n ldr r2, [sp, #52]\n bl planish_exact_code\n"
            "pop {r1, r2, r3, r4}\n"
            "ldr r7, [sp, #44]\n mov lr, r7\n ldr r7, [sp, #48]\n mov r12, r7\n b 231b\n");
}
#else
static const uint8_t *add_chunk(const int32_t *words, const uint8_t *weight, uint32_t *second, uint32_t *both)
{
    uint32_t sum = (uint32_t)words[0];
    int32_t k;
    for (k = 0; k < TAPS; k++) {
        sum += (uint32_t)words[1 + k] * weight[k];
    }
    *both += sum;
    *second += (uint32_t)((int32_t)sum >> 16);
    return weight + TAPS;
}

static void outputs_of(const pairs_t *p)
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

/* chunks of words from the codes of two pixels */
static inline int32_t *expand(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks)
{
#if defined(__ARM_ARCH_6M__)
#define PAIR(k)                                                                                                        \
    "ldrsb r5, [%[a], r3]\n ldrsb r6, [%[b], r3]\n lsls r6, r6, #16\n adds r5, r6\n str r5, [%[to], #" TEXT(4 + 4 * k) "]\n"      \
    "adds r4, r5\n adds r3, #1\n"
    int32_t *end = to + chunks * CHUNK_WORDS;
    __asm__ volatile(".syntax unified\n"
                     "movs r3, #0\n"
                     "1: movs r4, #0\n" PAIR(0) PAIR(1)
#if TAPS > 2
                         PAIR(2) PAIR(3)
#endif
#if TAPS > 4
                             PAIR(4) PAIR(5) PAIR(6) PAIR(7)
#endif
                     "lsls r4, r4, #7\n movs r5, #1\n lsls r5, r5, #15\n subs r5, r5, r4\n str r5, [%[to]]\n"
                     "adds %[to], #" TEXT(4 * CHUNK_WORDS) "\n"
                     "cmp %[to], %[end]\n bne 1b\n"
                     : [to] "+l"(to)
                     : [a] "l"(a), [b] "l"(b), [end] "h"(end)
                     : "r3", "r4", "r5", "r6", "cc", "memory");
    return to;
#else
    int32_t k;
    for (; chunks > 0; chunks--) {
        uint32_t sum = 0;
        for (k = 0; k < TAPS; k++) {
            uint32_t word = (uint32_t)*a++ + ((uint32_t)*b++ << 16);
            to[1 + k] = (int32_t)word;
            sum += word;
        }
        to[0] = (int32_t)(32768u - (sum << 7));
        to += CHUNK_WORDS;
    }
    return to;
#endif
}

#endif
