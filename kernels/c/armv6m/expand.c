/* The words of two pixels that pairs.h multiplies. */
#include "armv6m/pairs.h"

#if defined(__ARM_ARCH_6M__)
/* r0 a, r1 b, r2 to, r3 index, r4 sum, r5 word, r6 free, r7 word before, r12 end */
#define FIRST "ldrsb r5, [r0, r3]\n ldrsb r6, [r1, r3]\n lsls r6, r6, #16\n adds r5, r6\n str r5, [r2, #4]\n adds r3, #1\n mov r4, r5\n"
#define WHOLE(k)                                                                                                       \
    "ldrsb r5, [r0, r3]\n ldrsb r6, [r1, r3]\n lsls r6, r6, #16\n adds r5, r6\n str r5, [r2, #4*" #k "+4]\n adds r3, #1\n" \
    "adds r4, r5\n"
#define LESS(bits, k)                                                                                                  \
    "lsls r7, r5, #" #bits "\n ldrsb r5, [r0, r3]\n ldrsb r6, [r1, r3]\n lsls r6, r6, #16\n adds r5, r6\n"              \
    "subs r7, r5, r7\n str r7, [r2, #4*" #k "+4]\n adds r3, #1\n adds r4, r5\n"
#define EXPAND(name, bits, taps, body)                                                                                 \
    __attribute__((naked)) int32_t *name(const int8_t *a __attribute__((unused)), const int8_t *b __attribute__((unused)), \
                                         int32_t *to __attribute__((unused)), int32_t chunks __attribute__((unused)))  \
    {                                                                                                                  \
        __asm__(".syntax unified\n"                                                                                    \
                "push {r4, r5, r6, r7, lr}\n movs r4, #4*(" #taps "+1)\n muls r3, r4\n adds r3, r2\n mov r12, r3\n"    \
                "movs r3, #0\n"                                                                                        \
                "1: " FIRST body                                                                                       \
                "lsls r4, r4, #" #bits "-1\n movs r5, #1\n lsls r5, r5, #15\n subs r5, r5, r4\n str r5, [r2]\n"        \
                "adds r2, #4*(" #taps "+1)\n cmp r2, r12\n beq 2f\n b 1b\n"                                            \
                "2: mov r0, r2\n pop {r4, r5, r6, r7, pc}\n");                                                         \
    }
#define WHOLE3 WHOLE(1) WHOLE(2) WHOLE(3)
#define WHOLE7 WHOLE3 WHOLE(4) WHOLE(5) WHOLE(6) WHOLE(7)
#define LESS7(b) LESS(b, 1) LESS(b, 2) LESS(b, 3) LESS(b, 4) LESS(b, 5) LESS(b, 6) LESS(b, 7)
#define LESS15(b) LESS7(b) LESS(b, 8) LESS(b, 9) LESS(b, 10) LESS(b, 11) LESS(b, 12) LESS(b, 13) LESS(b, 14) LESS(b, 15)
EXPAND(planish_armv6m_expand_8x2, 8, 2, WHOLE(1))
EXPAND(planish_armv6m_expand_8x3, 8, 3, WHOLE(1) WHOLE(2))
EXPAND(planish_armv6m_expand_8x4, 8, 4, WHOLE3)
EXPAND(planish_armv6m_expand_8x8, 8, 8, WHOLE7)
EXPAND(planish_armv6m_expand_4x8, 4, 8, LESS7(4))
EXPAND(planish_armv6m_expand_2x16, 2, 16, LESS15(2))
#else
static int32_t *expand(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks, int32_t bits, int32_t taps)
{
    int32_t k;
    for (; chunks > 0; chunks--) {
        uint32_t sum = 0, before = 0;
        for (k = 0; k < taps; k++) {
            uint32_t word = (uint32_t)*a++ + ((uint32_t)*b++ << 16);
            to[1 + k] = (int32_t)(bits == 8 ? word : word - (before << bits));
            sum += word;
            before = word;
        }
        to[0] = (int32_t)(32768u - (sum << (bits - 1)));
        to += taps + 1;
    }
    return to;
}

#define EXPAND(name, bits, taps)                                                                                       \
    int32_t *name(const int8_t *a, const int8_t *b, int32_t *to, int32_t chunks)                                       \
    {                                                                                                                  \
        return expand(a, b, to, chunks, bits, taps);                                                                   \
    }
EXPAND(planish_armv6m_expand_8x2, 8, 2)
EXPAND(planish_armv6m_expand_8x3, 8, 3)
EXPAND(planish_armv6m_expand_8x4, 8, 4)
EXPAND(planish_armv6m_expand_8x8, 8, 8)
EXPAND(planish_armv6m_expand_4x8, 4, 8)
EXPAND(planish_armv6m_expand_2x16, 2, 16)
#endif
