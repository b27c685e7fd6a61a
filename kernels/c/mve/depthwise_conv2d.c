/* Depthwise convolution with MVE, kernels of up to 4 x 4: four rows of the input in one word, so that a vector of four words is
 * a piece of image of 4 x 4 pixels of one channel, and one multiply-accumulate across the vector is a whole window.
 *
 * Scratch holds, for every column, sixteen channels of such words (64 bytes a column). They are made by the interleaving store
 * VST4 from four rows of sixteen channels; padding is the zero point. Then each channel goes through the strip:
 *
 *     PLANISH_TILES (stride 1, up to 3 x 3): one vector holds four windows, those of 2 x 2 outputs; the weights lie in four
 *         vectors, moved by a column (a word) and by a row (a byte). Where the width is odd (PLANISH_ODD) the first two tiles overlap by a
 *         column, where the height is odd the last two rows of tiles by a row: an output is then computed twice. With PLANISH_IN_PLACE
 *         sixteen channels of the whole image come before the next, so that the output may be the input's own place.
 *     else: four outputs of a row, a vector each; PLANISH_STRIDE is the stride along the row.
 *
 * PLANISH_COLUMNS: columns of weights, a word each. PLANISH_NARROW: weights of 4 bits and no fourth row, a halfword each: rows 0, 2, 1 from bit
 * 4 on; two words a channel. PLANISH_CLAMP: the codes' bounds are not those of int8.
 */
#include "mve/bytes.h"
#include "mve/depthwise_conv2d.h"

enum { CHANNELS = 16, PITCH = 4 * CHANNELS };

/* words of a channel's bias, rescale and weights */
#ifdef PLANISH_NARROW
enum { RECORD = 4 };
#else
enum { RECORD = 2 + PLANISH_COLUMNS };
#endif

#ifdef PLANISH_TILES
enum { TILE_HEIGHT = 2, TILE_WIDTH = 2, COLUMN_STEP = 1, STEP_BYTES = 2 * PITCH };
#else
enum { TILE_HEIGHT = 1, TILE_WIDTH = 4, COLUMN_STEP = PLANISH_STRIDE, STEP_BYTES = PLANISH_STRIDE * PITCH };
#endif

/* the assembly code knows the places of the members */
typedef struct {
    const int8_t *x; /* 0: of the next channel: its words */
    int8_t *y;
    int32_t next_x, next_y; /* 8: from the last tile of a row of tiles to the first of the next */
    int32_t tiles;          /* 16: in a row, that are done in a loop */
    int32_t rows;           /* 20: of tiles */
    int32_t y_step;         /* 24: from tile to tile */
    int32_t zero_point;
    const uint32_t *weight; /* 32 */
    int32_t channels;
    int32_t low, high;   /* 40 */
    uint32_t outputs[4]; /* 48: offsets of a tile's outputs */
    uint32_t columns[4]; /* 64: offsets of a vector's columns */
    int32_t rows_left;   /* 80 */
    int32_t width;       /* 84: outputs of a row */
    int32_t x_pitch, y_pitch, pixel; /* bytes from a row of tiles, or of outputs, to the next, and of a pixel */
} strip_t;

#if defined(__ARM_FEATURE_MVE)

/* words of four rows and `channels` channels for `columns` columns; rows outside the image repeat one vector: their step is 0 */
static inline void interleave(const int8_t *const *rows, const int32_t *steps, int32_t columns, int32_t channels, int8_t *to)
{
    register const int8_t *const *from __asm__("r12") = rows;
    register const int32_t *step __asm__("r11") = steps;
    register int32_t count __asm__("r10") = columns;
    register int32_t lanes __asm__("r9") = channels;
    register int8_t *target __asm__("r8") = to;
    __asm__ volatile(
        "vctp.8 r9\n"
        "ldm r12, {r0, r1, r2, r3}\n"
        "ldm r11, {r4, r5, r6, r9}\n"
        "dls lr, r10\n"
        "1:\n"
        "vpstttt\n"
        "vldrbt.u8 q0, [r0]\n"
        "vldrbt.u8 q1, [r1]\n"
        "vldrbt.u8 q2, [r2]\n"
        "vldrbt.u8 q3, [r3]\n"
        "add r0, r0, r4\n"
        "add r1, r1, r5\n"
        "vst40.8 {q0, q1, q2, q3}, [r8]\n"
        "vst41.8 {q0, q1, q2, q3}, [r8]\n"
        "add r2, r2, r6\n"
        "vst42.8 {q0, q1, q2, q3}, [r8]\n"
        "add r3, r3, r9\n"
        "vst43.8 {q0, q1, q2, q3}, [r8]!\n"
        "le lr, 1b\n"
        : "+r"(from), "+r"(step), "+r"(count), "+r"(lanes), "+r"(target)
        :
        : "memory", "cc", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "lr", "q0", "q1", "q2", "q3");
}

#ifdef PLANISH_IN_PLACE

/* `channels` bytes of every pixel, CHANNELS bytes apart */
static inline void save(const int8_t *from, int32_t step, int32_t columns, int32_t channels, int8_t *to)
{
    __asm__ volatile(
        "vctp.8 %4\n"
        "dls lr, %3\n"
        "1:\n"
        "vpst\n"
        "vldrbt.u8 q0, [%0]\n"
        "add %0, %0, %2\n"
        "vstrb.8 q0, [%1], #16\n"
        "le lr, 1b\n"
        : "+r"(from), "+r"(to)
        : "r"(step), "r"(columns), "r"(channels)
        : "memory", "cc", "lr", "q0");
}

#endif

/* the lanes of a channel's weights */
#define LANES                                 \
    "movs r0, #" TEXT(PLANISH_COLUMNS) "\n" \
    "vctp.32 r0\n"

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

#ifdef PLANISH_NARROW
/* a weight to the upper half of its byte, then down with its sign */
#define LOAD_WEIGHTS              \
    "mov r6, r12\n"           \
    "add r12, r12, #8\n"      \
    "vpst\n"                  \
    "vldrht.u32 q1, [r6]\n"   \
    "vshl.i32 q2, q1, #12\n"     \
    "vorr q1, q1, q2\n"          \
    "vshr.s8 q1, q1, #4\n"
#else
#define LOAD_WEIGHTS \
    "vpst\n"         \
    "vldrwt.u32 q1, [r12], #4*" TEXT(PLANISH_COLUMNS) "\n"
#endif

#ifdef PLANISH_CLAMP
#define SATURATE                \
    "ldrd r0, r2, [r11, #40]\n" \
    "vdup.32 q0, r0\n"          \
    "vmax.s32 q5, q5, q0\n"     \
    "vdup.32 q0, r2\n"          \
    "vmin.s32 q5, q5, q0\n"
#else
#define SATURATE             \
    "vqmovnb.s32 q5, q5\n"   \
    "vqmovnb.s16 q5, q5\n"
#endif

/* codes of the sums r0, r2, r4, r6; r5 bias, r8 rescale, r9 zero point */
#define REQUANTIZE               \
    "vadd.i32 q5, q5, r5\n"      \
    "vcvt.f32.s32 q5, q5\n"      \
    "vmul.f32 q5, q5, r8\n"      \
    "vcvtn.s32.f32 q5, q5\n"     \
    "vqadd.s32 q5, q5, r9\n"     \
    SATURATE

#ifdef PLANISH_TILES
#define COUNT_ROWS "ldr r10, [r11, #20]\n"
#define ROW_DONE "subs r10, r10, #1\n"
#define PREDICATE_ONCE LANES
#define PREDICATE ""
#define TILE                             \
    "vldrw.u32 q0, [q7, #128]!\n"        \
    "vmladav.s8 r0, q0, q1\n"            \
    "vmladav.s8 r2, q0, q2\n"            \
    "vmladav.s8 r4, q0, q3\n"            \
    "vmladav.s8 r6, q0, q4\n"            \
    "vmov q5[2], q5[0], r0, r4\n"        \
    "vmov q5[3], q5[1], r2, r6\n"        \
    REQUANTIZE                           \
    "vstrb.32 q5, [r3, q6]\n"
#define WEIGHTS                  \
    "vmov q2, q1\n"              \
    "movs r0, #0\n"              \
    "vshlc q2, r0, #32\n"        \
    "vshl.i32 q3, q1, #8\n"      \
    "vshl.i32 q4, q2, #8\n"
#ifdef PLANISH_ODD
#define FIRST                    \
    TILE                         \
    "movs r0, #64\n"             \
    "vsub.i32 q7, q7, r0\n"      \
    "add r3, r3, r1, lsr #1\n"
#else
#define FIRST ""
#endif
#else
#define COUNT_ROWS          \
    "ldr r0, [r11, #20]\n" \
    "str r0, [r11, #80]\n"
#define ROW_DONE            \
    "ldr r0, [r11, #80]\n" \
    "subs r0, r0, #1\n"    \
    "str r0, [r11, #80]\n"
#define PREDICATE_ONCE ""
#define PREDICATE LANES
#define WINDOW(sum)                                                       \
    "vldrw.u32 q0, [q7, #64*" TEXT(PLANISH_STRIDE) "]!\n"                     \
    "vmladav.s8 " sum ", q0, q1\n"
#define TILE                         \
    WINDOW("r0")                     \
    WINDOW("r2")                     \
    WINDOW("r4")                     \
    WINDOW("r6")                     \
    "vmov q5[2], q5[0], r0, r4\n"    \
    "vmov q5[3], q5[1], r2, r6\n"    \
    REQUANTIZE                       \
    "vctp.32 r10\n"                  \
    "subs r10, r10, #4\n"            \
    "vpst\n"                         \
    "vstrbt.32 q5, [r3, q6]\n"
#define WEIGHTS ""
#define FIRST "ldr r10, [r11, #84]\n"
#endif

/* all outputs of the channels whose words are in scratch */
static __attribute__((noinline)) void convolve(strip_t *strip)
{
    register strip_t *at __asm__("r11") = strip;
    __asm__ volatile(
        "vldrw.u32 q6, [r11, #48]\n"
        "ldrd r1, r9, [r11, #24]\n"
        "ldr r12, [r11, #32]\n"
        PREDICATE_ONCE
        "5:\n" /* a channel */
        PREDICATE
        "ldrd r5, r8, [r12], #8\n"
        "ldrd r0, r3, [r11]\n"
        LOAD_WEIGHTS
        "vldrw.u32 q7, [r11, #64]\n"
        "vadd.i32 q7, q7, r0\n"
        "adds r0, r0, #4\n"
        "adds r2, r3, #1\n"
        "strd r0, r2, [r11]\n"
        WEIGHTS
        COUNT_ROWS
        "1:\n" /* a row of tiles */
        "ldr r0, [r11, #16]\n"
        "dls lr, r0\n"
        FIRST
        "2:\n"
        TILE
        "add r3, r3, r1\n"
        "le lr, 2b\n"
        "ldrd r0, r2, [r11, #8]\n"
        "vadd.i32 q7, q7, r0\n"
        "add r3, r3, r2\n"
        ROW_DONE
        "bne 1b\n"
        "ldr r0, [r11, #36]\n"
        "subs r0, r0, #1\n"
        "str r0, [r11, #36]\n"
        "bne 5b\n"
        : "+r"(at)
        :
        : "memory", "cc", "r0", "r1", "r2", "r3", "r4", "r5", "r6", "r8", "r9", "r10", "r12", "lr", "q0", "q1", "q2",
          "q3", "q4", "q5", "q6", "q7");
}

#else

static inline void interleave(const int8_t *const *rows, const int32_t *steps, int32_t columns, int32_t channels, int8_t *to)
{
    int32_t column, channel, row;
    for (column = 0; column < columns; column++) {
        for (channel = 0; channel < channels; channel++) {
            for (row = 0; row < 4; row++) {
                to[column * PITCH + channel * 4 + row] = rows[row][column * steps[row] + channel];
            }
        }
    }
}

#ifdef PLANISH_IN_PLACE

static inline void save(const int8_t *from, int32_t step, int32_t columns, int32_t channels, int8_t *to)
{
    int32_t column;
    for (column = 0; column < columns; column++) {
        copy_bytes(to + column * CHANNELS, from + column * step, channels);
    }
}

#endif

static int32_t weight_of(const uint32_t *record, int32_t column, int32_t row)
{
#ifdef PLANISH_NARROW
    int32_t place = row == 0 ? 4 : row == 1 ? 12 : 8, half = ((const uint16_t *)(record + 2))[column];
    return row == 3 ? 0 : ((half >> place & 15) ^ 8) - 8;
#else
    return ((const int8_t *)(record + 2 + column))[row];
#endif
}

static int8_t code_of(const strip_t *s, const int8_t *words, int32_t row, const uint32_t *record)
{
    union { uint32_t i; float f; } rescale;
    int32_t sum = (int32_t)record[0], column, i;
    rescale.i = record[1];
    for (column = 0; column < PLANISH_COLUMNS; column++) {
        for (i = 0; i + row < 4; i++) {
            sum += words[column * PITCH + i + row] * weight_of(record, column, i);
        }
    }
    return planish_requantize(sum, rescale.f, (float)(s->low - s->zero_point), (float)(s->high - s->zero_point),
                              s->zero_point);
}

static __attribute__((noinline)) void convolve(strip_t *s)
{
    int32_t channel, tile, row, column;
    for (channel = 0; channel < s->channels; channel++) {
        const uint32_t *record = s->weight + channel * RECORD;
        for (tile = 0; tile < s->rows; tile++) {
            for (row = 0; row < TILE_HEIGHT; row++) {
                const int8_t *words = s->x + STEP_BYTES + tile * s->x_pitch + channel * 4;
                int8_t *y = s->y + (tile * TILE_HEIGHT + row) * s->y_pitch + channel;
                for (column = 0; column < s->width; column++) {
                    y[column * s->pixel] = code_of(s, words + column * COLUMN_STEP * PITCH, row, record);
                }
            }
        }
    }
}

#endif

/* what strips and channels have in common */
typedef struct {
    const planish_mve_depthwise_conv2d_layer *layer;
    const int8_t *x;
    int8_t *y, *words; /* scratch, from the first column of the image on */
    int8_t *above;     /* in place: the row above a strip, CHANNELS bytes a column */
    int32_t inside;    /* columns of the image that vectors read */
    int8_t padding[CHANNELS];
} task_t;

/* words of a row of tiles whose windows begin in row `top`; `saved`: that row lies in `above` */
static __attribute__((noinline)) void gather(const task_t *t, int32_t top, int32_t first, int32_t count, int saved, int8_t *words)
{
    int32_t channels = t->layer->channels, row_bytes = t->layer->in_width * channels, i;
    const int8_t *sources[4], *source = t->x + top * row_bytes + first;
    int32_t steps[4];
    for (i = 0; i < 4; i++) {
        int valid = (uint32_t)(top + i) < (uint32_t)t->layer->in_height;
        sources[i] = valid ? source : t->padding;
        steps[i] = valid ? channels : 0;
        source += row_bytes;
    }
    if (saved) {
        sources[0] = t->above;
        steps[0] = CHANNELS;
    }
    interleave(sources, steps, t->inside, count, words);
}

/* rows of tiles `rows` from output row `out_row` on, and one more over the last row where `extra`, for channels from `first` on */
static inline void convolve_strip(const task_t *t, strip_t *s, int32_t out_row, int32_t rows, int extra, int32_t first)
{
    const planish_mve_depthwise_conv2d_layer *l = t->layer;
    int32_t count = l->channels - first < CHANNELS ? l->channels - first : CHANNELS, row;
    int32_t top = out_row * l->stride_height - l->pad_top;
    int8_t *words = t->words;
    for (row = 0; row < rows; row++) {
#ifdef PLANISH_IN_PLACE
        gather(t, top, first, count, row == 0 && l->pad_top == 1 && out_row > 0, words);
#else
        gather(t, top, first, count, 0, words);
#endif
        words += s->x_pitch;
        top += TILE_HEIGHT * l->stride_height;
    }
    if (extra) {
        gather(t, top - 1, first, count, 0, words);
    }
#ifdef PLANISH_IN_PLACE
    if (l->pad_top == 1) { /* the next strip's windows begin in this one's last row, which is about to be overwritten */
        save(t->x + (out_row + rows * TILE_HEIGHT - 1) * s->y_pitch + first, l->channels, l->in_width, count, t->above);
    }
#endif
    s->x = t->words - l->pad_left * PITCH - STEP_BYTES;
    s->y = t->y + out_row * s->y_pitch + first;
    s->rows = rows;
    s->weight = l->weight + first * RECORD;
    s->channels = count;
    convolve(s);
    if (extra) {
        s->x = words - l->pad_left * PITCH - STEP_BYTES;
        s->y = t->y + (l->out_height - TILE_HEIGHT) * s->y_pitch + first;
        s->rows = 1;
        s->channels = count;
        convolve(s);
    }
}

void PLANISH_KERNEL(const planish_mve_depthwise_conv2d_layer *l, const int8_t *x, int8_t *y, int8_t *scratch)
{
    int32_t channels = l->channels, i, first;
#ifdef PLANISH_TILES
    int32_t columns = l->out_width + 2; /* that vectors read; those outside the image are padding */
#else
    int32_t tiles = (l->out_width + TILE_WIDTH - 1) / TILE_WIDTH;
    int32_t columns = (tiles * TILE_WIDTH - 1) * COLUMN_STEP + 4;
#endif
    int32_t room = l->strip + l->out_height % TILE_HEIGHT; /* rows of tiles in scratch */
    int32_t out_row, end = l->out_height / TILE_HEIGHT * TILE_HEIGHT;
    strip_t s;
    task_t t;
    t.layer = l;
    t.x = x;
    t.y = y;
    t.words = scratch + l->pad_left * PITCH;
    t.above = scratch + room * columns * PITCH;
    t.inside = columns - l->pad_left < l->in_width ? columns - l->pad_left : l->in_width;
    fill_bytes(t.padding, l->x_zero_point, CHANNELS);
    s.x_pitch = columns * PITCH;
    s.y_pitch = l->out_width * channels;
    s.pixel = channels;
    s.width = l->out_width;
    s.zero_point = l->y_zero_point;
    s.low = l->low;
    s.high = l->high;
    s.y_step = TILE_WIDTH * channels;
#ifdef PLANISH_TILES
    s.tiles = l->out_width / 2; /* the first one of an odd width stands before the loop */
    s.next_x = s.x_pitch - l->out_width * PITCH;
    s.next_y = s.y_pitch;
#else
    s.tiles = tiles;
    s.next_x = s.x_pitch - tiles * STEP_BYTES * TILE_WIDTH;
    s.next_y = s.y_pitch - tiles * s.y_step;
#endif
    for (i = 0; i < 4; i++) {
#ifdef PLANISH_TILES
        s.outputs[i] = (uint32_t)(i / 2 * s.y_pitch + i % 2 * channels);
#else
        s.outputs[i] = (uint32_t)(i * channels);
#endif
        s.columns[i] = (uint32_t)(i * PITCH);
    }
    /* the columns beside the image stay as they are for all channels and strips */
    for (i = 0; i < room; i++) {
        int8_t *words = scratch + i * s.x_pitch;
        int32_t left = (l->pad_left + t.inside) * PITCH;
        fill_bytes(words, l->x_zero_point, l->pad_left * PITCH);
        fill_bytes(words + left, l->x_zero_point, s.x_pitch - left);
    }
#ifdef PLANISH_IN_PLACE
    for (first = 0; first < channels; first += CHANNELS) {
        for (out_row = 0; out_row < end; out_row += l->strip * TILE_HEIGHT) {
#else
    for (out_row = 0; out_row < end; out_row += l->strip * TILE_HEIGHT) {
        for (first = 0; first < channels; first += CHANNELS) {
#endif
            int32_t rows = (end - out_row) / TILE_HEIGHT;
            int extra = rows <= l->strip && end < l->out_height;
            convolve_strip(&t, &s, out_row, rows < l->strip ? rows : l->strip, extra, first);
        }
    }
}
