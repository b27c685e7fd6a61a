/* What the assembly of the products shares; see product.h.
 *
 * Two columns. Registers: r0 weights, r1 pairs; r4-r7 sums of the first column, r8-r11 of the second; r2 r3 weights, r12 lr
 * activations. There is none left for a counter, so the loop ends where the pairs do. The stack holds, from sp on:
 *   0 pairs, 4 where to enter the unrolled loop, 8 end of the pairs, 16 y, 20 groups left, 24 second, 28 zero points,
 *   32 sums of the activations of both columns
 *
 * One column. Registers: r0 weights, r1 codes; r4-r7 sums; r8-r11 weights, r2 r3 r12 lr activations. The stack is as above, with
 * codes for pairs and the sum of the activations for second; a round of the unrolled loop takes two units.
 */
#ifndef PLANISH_DSP_PRODUCT_ASM_H
#define PLANISH_DSP_PRODUCT_ASM_H

/* r0 product, r2 y, r3 second or sum. After it: r0 weights, r4 units */
#define FRAME                                                              \
    ".syntax unified\n"                                                    \
    "push {r4-r11, lr}\n"                                                  \
    "sub sp, #40\n"                                                        \
    "ldmia r0, {r0, r4, r5, r6}\n" /* weight, units, groups, zero points */ \
    "strd r2, r5, [sp, #16]\n"                                             \
    "strd r3, r6, [sp, #24]\n"

/* r7: where r1 ends; r4: rounds to skip at first; BYTES: of code of a round */
#define ENTRY(BYTES)                                                       \
    "str r7, [sp, #8]\n"                                                   \
    "movs r5, #" BYTES "\n"                                                \
    "adr r6, 2f\n"                                                         \
    "mla r6, r4, r5, r6\n"                                                 \
    "adds r6, #1\n" /* Thumb */                                            \
    "strd r1, r6, [sp]\n"

#define PRODUCT_ENTER(BYTES)               \
    FRAME                                  \
    "add r7, r1, r4, lsl #4\n"             \
    "rsb r4, r4, #0\n"                     \
    "and r4, r4, #7\n"                     \
    ENTRY(BYTES)

#define ROW_ENTER(BYTES)                   \
    FRAME                                  \
    "add r7, r1, r4, lsl #2\n"             \
    "rsb r4, r4, #0\n"                     \
    "ubfx r4, r4, #1, #3\n"                \
    ENTRY(BYTES)

/* the sums of both columns' activations, which narrow weights' bias is multiplied with; follows PRODUCT_ENTER */
#define PRODUCT_SUMS               \
    "movs r8, #0\n"                \
    "movs r9, #0\n"                \
    "mov.w r10, #0x00010001\n"     \
    "sub r11, r7, r1\n"            \
    "tst r11, #16\n"               \
    "bne 4f\n"                     \
    "3:\n"                         \
    SUM_UNIT                       \
    "4:\n"                         \
    SUM_UNIT                       \
    "cmp r1, r7\n"                 \
    "bne 3b\n"                     \
    "strd r8, r9, [sp, #32]\n"

#define SUM_UNIT                   \
    "ldmia r1!, {r2-r5}\n"         \
    "smlad r8, r2, r10, r8\n"      \
    "smlad r9, r3, r10, r9\n"      \
    "smlad r8, r4, r10, r8\n"      \
    "smlad r9, r5, r10, r9\n"

/* label 1: the next group; label 2: the loop, eight rounds of what follows */
#define PRODUCT_GROUP              \
    "1:\n"                         \
    "ldmia r0!, {r4-r7}\n"         \
    "mov r8, r4\n"                 \
    "mov r9, r5\n"                 \
    "mov r10, r6\n"                \
    "mov r11, r7\n"                \
    "ldmia.w sp, {r1, pc}\n"       \
    ".p2align 2\n"                 \
    "2:\n"                         \
    ".rept 8\n"

/* the same for one column */
#define ROW_GROUP                  \
    "1:\n"                         \
    "ldmia r0!, {r4-r7}\n"         \
    "ldmia.w sp, {r1, pc}\n"       \
    ".p2align 2\n"                 \
    "2:\n"                         \
    ".rept 8\n"

#define LOOP                       \
    ".endr\n"                      \
    "ldr r2, [sp, #8]\n"           \
    "cmp r1, r2\n"                 \
    "bne 2b\n"

/* two units of activations: r2 r3 r12 lr */
#define ROW_EXPAND                 \
    "ldrd r2, r12, [r1], #8\n"     \
    "sxtb16 r3, r2, ror #8\n"      \
    "sxtb16 r2, r2\n"              \
    "sxtb16 lr, r12, ror #8\n"     \
    "sxtb16 r12, r12\n"

/* differences of the sums r of narrow weights, less the activations' sum S times the bias of fields 1, 2, 3 in their power of two */
#define DIFFERENCES(A, B, C, D, S, ONE, TWO, THREE)  \
    "sub " A ", " A ", " B "\n"                      \
    "sub " B ", " B ", " C "\n"                      \
    "sub " C ", " C ", " D "\n"                      \
    "sub " B ", " B ", " S ", lsl #" ONE "\n"        \
    "sub " C ", " C ", " S ", lsl #" TWO "\n"        \
    "sub " D ", " D ", " S ", lsl #" THREE "\n"

/* the same for two fields */
#define DIFFERENCE(A, B, S, POWER)                   \
    "sub " A ", " A ", " B "\n"                      \
    "sub " B ", " B ", " S ", lsl #" POWER "\n"

/* sums r4-r11, or r4-r7, times their factors, to the nearest integers */
#define PRODUCT_ROUND                                                                           \
    "vldmia r0!, {s8-s11}\n"                                                                    \
    "vmov s0, s1, r4, r5\n vmov s2, s3, r6, r7\n vmov s4, s5, r8, r9\n vmov s6, s7, r10, r11\n"     \
    "vcvt.f32.s32 s0, s0\n vcvt.f32.s32 s1, s1\n vcvt.f32.s32 s2, s2\n vcvt.f32.s32 s3, s3\n"     \
    "vcvt.f32.s32 s4, s4\n vcvt.f32.s32 s5, s5\n vcvt.f32.s32 s6, s6\n vcvt.f32.s32 s7, s7\n"     \
    "vmul.f32 s0, s0, s8\n vmul.f32 s1, s1, s9\n vmul.f32 s2, s2, s10\n vmul.f32 s3, s3, s11\n"   \
    "vmul.f32 s4, s4, s8\n vmul.f32 s5, s5, s9\n vmul.f32 s6, s6, s10\n vmul.f32 s7, s7, s11\n"   \
    "vcvtr.s32.f32 s0, s0\n vcvtr.s32.f32 s1, s1\n vcvtr.s32.f32 s2, s2\n vcvtr.s32.f32 s3, s3\n" \
    "vcvtr.s32.f32 s4, s4\n vcvtr.s32.f32 s5, s5\n vcvtr.s32.f32 s6, s6\n vcvtr.s32.f32 s7, s7\n" \
    "vmov r4, r5, s0, s1\n vmov r6, r7, s2, s3\n vmov r8, r9, s4, s5\n vmov r10, r11, s6, s7\n"

#define ROW_ROUND                                                                               \
    "vldmia r0!, {s8-s11}\n"                                                                    \
    "vmov s0, s1, r4, r5\n vmov s2, s3, r6, r7\n"                                                 \
    "vcvt.f32.s32 s0, s0\n vcvt.f32.s32 s1, s1\n vcvt.f32.s32 s2, s2\n vcvt.f32.s32 s3, s3\n"     \
    "vmul.f32 s0, s0, s8\n vmul.f32 s1, s1, s9\n vmul.f32 s2, s2, s10\n vmul.f32 s3, s3, s11\n"   \
    "vcvtr.s32.f32 s0, s0\n vcvtr.s32.f32 s1, s1\n vcvtr.s32.f32 s2, s2\n vcvtr.s32.f32 s3, s3\n" \
    "vmov r4, r5, s0, s1\n vmov r6, r7, s2, s3\n"

/* four numbers (within 16 bits) plus r12, saturated, to the bytes of A: USAT16 counts codes from 0, the sign bit turns them back */
#define CODES(A, B, C, D)                      \
    "pkhbt " A ", " A ", " C ", lsl #16\n"     \
    "pkhbt " B ", " B ", " D ", lsl #16\n"     \
    "sadd16 " A ", " A ", r12\n"               \
    "sadd16 " B ", " B ", r12\n"               \
    "usat16 " A ", #8, " A "\n"                \
    "usat16 " B ", #8, " B "\n"                \
    "orr " A ", " A ", " B ", lsl #8\n"        \
    "eor " A ", " A ", #0x80808080\n"

/* four numbers of any size */
#define FAR_CODES(A, B, C, D, TO)              \
    "qadd " A ", " A ", r12\n"                 \
    "qadd " B ", " B ", r12\n"                 \
    "qadd " C ", " C ", r12\n"                 \
    "qadd " D ", " D ", r12\n"                 \
    "ssat " A ", #8, " A "\n"                  \
    "ssat " B ", #8, " B "\n"                  \
    "ssat " C ", #8, " C "\n"                  \
    "ssat " D ", #8, " D "\n"                  \
    "strb " A ", [" TO "]\n"                   \
    "strb " B ", [" TO ", #1]\n"               \
    "strb " C ", [" TO ", #2]\n"               \
    "strb " D ", [" TO ", #3]\n"

/* before FAR_CODES: the zero point alone */
#define FAR_ZERO_POINT             \
    "uxth r12, r12\n"              \
    "sub r12, #128\n"

/* r2 y, lr groups left, r3 second, r12 zero points */
#define OUTPUT                     \
    "ldrd r2, lr, [sp, #16]\n"     \
    "ldrd r3, r12, [sp, #24]\n"

#define NEXT                       \
    "subs lr, #1\n"                \
    "strd r2, lr, [sp, #16]\n"     \
    "bne 1b\n"                     \
    "add sp, #40\n"                \
    "pop {r4-r11, pc}\n"

#define PRODUCT_REQUANTIZE             \
    PRODUCT_ROUND                      \
    OUTPUT                             \
    CODES("r4", "r5", "r6", "r7")      \
    CODES("r8", "r9", "r10", "r11")    \
    "str r8, [r2, r3]\n"               \
    "str r4, [r2], #4\n"               \
    NEXT

#define ROW_REQUANTIZE                 \
    ROW_ROUND                          \
    OUTPUT                             \
    CODES("r4", "r5", "r6", "r7")      \
    "str r4, [r2], #4\n"               \
    NEXT

#define PRODUCT_FAR_REQUANTIZE                       \
    PRODUCT_ROUND                                    \
    OUTPUT                                           \
    FAR_ZERO_POINT                                   \
    "add r3, r2\n"                                   \
    FAR_CODES("r8", "r9", "r10", "r11", "r3")        \
    FAR_CODES("r4", "r5", "r6", "r7", "r2")          \
    "adds r2, #4\n"                                  \
    NEXT

#define ROW_FAR_REQUANTIZE                           \
    ROW_ROUND                                        \
    OUTPUT                                           \
    FAR_ZERO_POINT                                   \
    FAR_CODES("r4", "r5", "r6", "r7", "r2")          \
    "adds r2, #4\n"                                  \
    NEXT

#endif
