/* Product of 4-bit weights with one column, sums of any size; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W: the bytes of two depths, A: their activations */
#define STEP(W, A)                              \
    "sxtb16 r10, " W "\n"                       \
    "smlad r4, r10, " A ", r4\n"                \
    "and r10, r10, #0x000F000F\n"               \
    "smlad r5, r10, " A ", r5\n"                \
    "sxtb16 " W ", " W ", ror #8\n"             \
    "smlad r6, " W ", " A ", r6\n"              \
    "and " W ", " W ", #0x000F000F\n"           \
    "smlad r7, " W ", " A ", r7\n"

__attribute__((naked)) void planish_row_product_4_far(__attribute__((unused)) const planish_product *product,
                                                      __attribute__((unused)) const int8_t *x,
                                                      __attribute__((unused)) int8_t *y,
                                                      __attribute__((unused)) int32_t sum)
{
    __asm__(ROW_ENTER("156")
            ROW_GROUP
            ROW_EXPAND
            "ldrd r8, r9, [r0], #8\n"
            STEP("r8", "r2")
            STEP("r9", "r3")
            "ldrd r8, r9, [r0], #8\n"
            STEP("r8", "r12")
            STEP("r9", "lr")
            LOOP
            "ldr r2, [sp, #24]\n"
            DIFFERENCE("r4", "r5", "r2", "3")
            DIFFERENCE("r6", "r7", "r2", "3")
            ROW_FAR_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_row_product_4_far(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
{
    (void)sum;
    planish_row_product_c(product, x, y, FORM_4_FAR);
}
#endif
