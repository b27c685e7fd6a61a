/* Product of 8-bit weights with one column; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* W0 with outputs 0 and 1, W1 with outputs 2 and 3, by the activations A */
#define STEP(W0, W1, A)                             \
    "smlad r4, " W0 ", " A ", r4\n"                 \
    "sxtb16 " W0 ", " W0 "\n"                       \
    "smlad r5, " W0 ", " A ", r5\n"                 \
    "smlad r6, " W1 ", " A ", r6\n"                 \
    "sxtb16 " W1 ", " W1 "\n"                       \
    "smlad r7, " W1 ", " A ", r7\n"

__attribute__((naked)) void planish_row_product_8(__attribute__((unused)) const planish_product *product,
                                                  __attribute__((unused)) const int8_t *x,
                                                  __attribute__((unused)) int8_t *y, __attribute__((unused)) int32_t sum)
{
    __asm__(ROW_ENTER("124")
            ROW_GROUP
            ROW_EXPAND
            "ldmia.w r0!, {r8-r11}\n"
            STEP("r8", "r9", "r2")
            STEP("r10", "r11", "r3")
            "ldmia.w r0!, {r8-r11}\n"
            STEP("r8", "r9", "r12")
            STEP("r10", "r11", "lr")
            LOOP
            "sub r4, r4, r5\n"
            "sub r6, r6, r7\n"
            ROW_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_row_product_8(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
{
    (void)sum;
    planish_row_product_c(product, x, y, FORM_8);
}
#endif
