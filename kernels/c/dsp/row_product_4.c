/* Product of 4-bit weights with one column; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W: h of two depths, A: their activations */
#define STEP(W, A)                            \
    "smlad r4, " W ", " A ", r4\n"            \
    "bic " W ", " W ", #0xF000F000\n"         \
    "smlad r5, " W ", " A ", r5\n"            \
    "uxtb16 " W ", " W "\n"                   \
    "smlad r6, " W ", " A ", r6\n"            \
    "and " W ", " W ", #0x000F000F\n"         \
    "smlad r7, " W ", " A ", r7\n"

__attribute__((naked)) void planish_row_product_4(__attribute__((unused)) const planish_product *product,
                                                  __attribute__((unused)) const int8_t *x,
                                                  __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t sum)
{
    __asm__(ROW_ENTER("136")
            ROW_GROUP
            ROW_EXPAND
            "ldmia.w r0!, {r8-r11}\n"
            STEP("r8", "r2")
            STEP("r9", "r3")
            STEP("r10", "r12")
            STEP("r11", "lr")
            LOOP
            "ldr r2, [sp, #24]\n"
            DIFFERENCES("r4", "r5", "r6", "r7", "r2", "11", "7", "3")
            ROW_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_row_product_4(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
{
    (void)sum;
    planish_row_product_c(product, x, y, FORM_4);
}
#endif
