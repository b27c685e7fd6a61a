/* Product of 8-bit weights with one column, sums of any size; see product.h. */
#include "dsp/product.h"

#if defined(__ARM_FEATURE_DSP) && defined(__ARM_FP)
#include "dsp/product_asm.h"

/* the next weights of four outputs by the activations A */
#define STEP(A)                         \
    "ldrd r8, r9, [r0], #8\n"           \
    "sxtb16 r10, r8, ror #8\n"          \
    "smlad r4, r10, " A ", r4\n"        \
    "sxtb16 r8, r8\n"                   \
    "smlad r5, r8, " A ", r5\n"         \
    "sxtb16 r10, r9, ror #8\n"          \
    "smlad r6, r10, " A ", r6\n"        \
    "sxtb16 r9, r9\n"                   \
    "smlad r7, r9, " A ", r7\n"

__attribute__((naked)) void planish_row_product_8_far(__attribute__((unused)) const planish_product *product,
                                                      __attribute__((unused)) const int8_t *x,
                                                      __attribute__((unused)) int8_t *y,
                                                      __attribute__((unused)) int32_t sum)
{
    __asm__(ROW_ENTER("164")
            ROW_GROUP
            ROW_EXPAND
            STEP("r2")
            STEP("r3")
            STEP("r12")
            STEP("lr")
            LOOP
            ROW_FAR_REQUANTIZE);
}
#else
#include "dsp/product_c.h"

void planish_row_product_8_far(const planish_product *product, const int8_t *x, int8_t *y, int32_t sum)
{
    (void)sum;
    planish_row_product_c(product, x, y, FORM_8_FAR);
}
#endif
