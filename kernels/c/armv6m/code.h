/* The code of a sum in Thumb instructions: what planish_code does, with the layer's constants in registers.
 *
 * CODE(s, n) turns the sum in register s into its code. r4 holds the channel's word, r6 its upper half, r5 `half`, r3 `limit`,
 * r12 `window`; r7 is free. What it branches to for a sum that saturates is SATURATED(s, n), for one that must be computed
 * in full the label 22n, which comes back to 23n with the code in s. LOW and HIGH are places on the stack.
 */
#ifndef PLANISH_ARMV6M_CODE_H
#define PLANISH_ARMV6M_CODE_H

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)

#if ONE_SIDED
#define CODE(s, n)                                                                                                     \
    "asrs " s ", r4\n cmp " s ", r3\n bhi 20" n "f\n muls " s ", r6\n adds " s ", r5\n bmi 21" n "f\n lsls r7, " s      \
    ", #9\n cmp r7, r12\n blo 22" n "f\n lsrs " s ", " s ", #23\n subs " s ", #128\n 23" n ":\n"
#define SATURATED(s, n)                                                                                                \
    "20" n ": asrs " s ", " s ", #31\n movs r7, #127\n eors " s ", r7\n b 23" n "b\n 21" n ": movs " s                  \
    ", #127\n b 23" n "b\n"
#else
#if CLAMPED
#define KEPT(s, n)                                                                                                     \
    "ldr r7, [sp, #" TEXT(LOW) "]\n cmp " s ", r7\n bge 24" n "f\n mov " s ", r7\n 24" n ": ldr r7, [sp, #" TEXT(HIGH)  \
    "]\n cmp " s ", r7\n ble 25" n "f\n mov " s ", r7\n 25" n ":\n"
#else
#define KEPT(s, n)
#endif
#define CODE(s, n)                                                                                                     \
    "asrs " s ", r4\n sxth r7, " s "\n cmp r7, " s "\n bne 22" n "f\n muls " s ", r6\n adds " s ", r5\n lsls r7, " s    \
    ", #10\n cmp r7, r12\n blo 22" n "f\n lsrs " s ", " s ", #22\n cmp " s ", #255\n bhi 22" n "f\n subs " s            \
    ", #128\n" KEPT(s, n) "23" n ":\n"
#define SATURATED(s, n)
#endif

#endif
