/* Product of 2-bit weights with one column; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W: the numbers of two depths, A: their activations */
#define STEP(W, A)                            \
    "smlad r4, " W ", " A ", r4\n"            \
    "and " W ", " W ", #0x003F003F\n"         \
    "smlad r5, " W ", " A ", r5\n"            \
    "and " W ", " W ", #0x000F000F\n"         \
    "smlad r6, " W ", " A ", r6\n"            \
    "and " W ", " W ", #0x00030003\n"         \
    "smlad r7, " W ", " A ", r7\n"

__attribute__((naked)) void planish_row_product_2(__attribute__((unused)) const planish_product *product,
                                                  __attribute__((unused)) const int8_t *x,
                                                  __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t sum)
{
    __asm__(ROW_ENTER("152")
            ROW_GROUP
            ROW_EXPAND
            "ldrd r8, r9, [r0], #8\n"
            "sxtb16 r10, r8\n"
            STEP("r10", "r2")
            "sxtb16 r8, r8, ror #8\n"
            STEP("r8", "r3")
            "sxtb16 r10, r9\n"
            STEP("r10", "r12")
            "sxtb16 r9, r9, ror #8\n"
            STEP("r9", "lr")
            LOOP
            "ldr r2, [sp, #24]\n"
            DIFFERENCES("r4", "r5", "r6", "r7", "r2", "5", "3", "1")
            ROW_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_row_product_2(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
{
    (void)sum;
    planish_row_product_c(product, x, y, FORM_2);
}
#endif
