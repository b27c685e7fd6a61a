/* Copies a block of a map, row by row; by words where all addresses are multiples of 4. */
#include "planish.h"

#if defined(__GNUC__)
typedef uint32_t __attribute__((may_alias)) word_t;
#else
typedef int8_t word_t; /* a compiler that cannot be told of the aliasing copies bytes */
#endif

enum { SIZE = sizeof(word_t) };

void planish_copy_block(const planish_copy_block_layer *l, const int8_t *x, int8_t *y)
{
    const int8_t *source = x + l->x_offset;
    int8_t *target = y + l->y_offset;
    int32_t misaligned = (int32_t)(((uintptr_t)source | (uintptr_t)target) & 3u);
    int32_t words = ((l->x_stride | l->y_stride | misaligned) & 3) == 0 ? l->width / SIZE : 0;
    int32_t row, i;
    for (row = 0; row < l->rows; row++) {
        const word_t *from = (const word_t *)(const void *)source;
        word_t *to = (word_t *)(void *)target;
        for (i = 0; i < words; i++) {
            to[i] = from[i];
        }
        for (i = words * SIZE; i < l->width; i++) {
            target[i] = source[i];
        }
        source += l->x_stride;
        target += l->y_stride;
    }
}
