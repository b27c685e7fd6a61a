/* QEMU TCG plugin (API version 1: QEMU 4.2 to 8): what a firmware executes between its marks.
 *
 * Arguments: out=FILE, and in hexadecimal run=ADDRESS (the model's function), mark=FIRST-END (the function that is called after each
 * layer) and done=FIRST-END (the one after a run). Executing the first instruction of a mark writes
 * "<run|mark|done> <instructions> <words read> <words written> <taken branches>", all counted from the start of QEMU and before
 * that instruction. The functions mark and done themselves are not counted.
 *
 * A word is an aligned group of four bytes: an instruction that touches several bytes of one counts it once, one that loads
 * two registers or a vector counts as many words as it touches. (QEMU reports a vector's bytes one by one.)
 * The prototypes below are declared here from the plugin API's documentation, so that no QEMU header is needed. */
#include <inttypes.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef uint64_t plugin_id;
typedef uint32_t memory_info;
enum callback_flags { NO_REGISTERS };
enum memory_kind { READS = 1, WRITES, BOTH };
enum inline_op { ADD };

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned, void *), enum callback_flags, void *);
void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), enum callback_flags, void *);
void qemu_plugin_register_vcpu_insn_exec_inline(struct qemu_plugin_insn *, enum inline_op, void *, uint64_t);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, void (*)(unsigned, memory_info, uint64_t, void *),
                                      enum callback_flags, enum memory_kind, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
size_t qemu_plugin_insn_size(const struct qemu_plugin_insn *);
bool qemu_plugin_mem_is_store(memory_info);
unsigned qemu_plugin_mem_size_shift(memory_info);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

typedef struct {
    uint64_t first, end;
} range;

static FILE *out;
static range run, mark, done;
static uint64_t instructions, reads, writes, branches;

static bool in(range r, uint64_t address) { return r.first <= address && address < r.end; }

/* ---- marks ---- */

static void write_counts(const char *name)
{
    fprintf(out, "%s %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", name, instructions, reads, writes, branches);
    fflush(out);
}

static void on_run(unsigned cpu, void *data)
{
    (void)cpu, (void)data;
    write_counts("run");
    instructions++; /* its own, which is not counted inline: QEMU does not say which of the two comes first */
}

static void on_mark(unsigned cpu, void *data)
{
    (void)cpu;
    write_counts(data);
}

/* ---- branches: a block that does not begin where the one before it ended ---- */

typedef struct {
    uint64_t first, end;
    bool counted;
} block;

static uint64_t expected; /* 0: not known, after a function that is not counted */

static void on_block(unsigned cpu, void *data)
{
    const block *b = data;
    (void)cpu;
    branches += expected && b->first != expected;
    expected = b->counted ? b->end : 0;
}

/* ---- memory ---- */

static uint64_t last_instruction, last_word;

static void on_access(unsigned cpu, memory_info info, uint64_t address, void *data)
{
    uint64_t word = address >> 2, end = (address + (1u << qemu_plugin_mem_size_shift(info)) - 1) >> 2;
    (void)cpu, (void)data;
    for (; word <= end; word++) {
        if (last_instruction == instructions && last_word == word) continue;
        last_instruction = instructions;
        last_word = word;
        if (qemu_plugin_mem_is_store(info)) writes++;
        else reads++;
    }
}

/* ---- translation ---- */

/* blocks and their descriptions live as long as QEMU; a firmware has a few thousand */
static block blocks[1 << 18];
static size_t block_count;

static void on_translate(plugin_id id, struct qemu_plugin_tb *tb)
{
    const size_t count = qemu_plugin_tb_n_insns(tb);
    block *b = &blocks[block_count];
    (void)id;
    if (block_count + 1 < sizeof blocks / sizeof *blocks) block_count++;
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        const uint64_t address = qemu_plugin_insn_vaddr(insn);
        const bool counted = !in(mark, address) && !in(done, address);
        if (i == 0) {
            b->first = address;
            b->counted = counted;
        }
        b->end = address + qemu_plugin_insn_size(insn);
        if (address == run.first) qemu_plugin_register_vcpu_insn_exec_cb(insn, on_run, NO_REGISTERS, 0);
        else if (counted) qemu_plugin_register_vcpu_insn_exec_inline(insn, ADD, &instructions, 1);
        if (address == mark.first) qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark, NO_REGISTERS, "mark");
        if (address == done.first) qemu_plugin_register_vcpu_insn_exec_cb(insn, on_mark, NO_REGISTERS, "done");
        /* both kinds, sorted out in the callback: in QEMU 7 the filter is off by one (READS gives stores) */
        if (counted) qemu_plugin_register_vcpu_mem_cb(insn, on_access, NO_REGISTERS, BOTH, 0);
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_block, NO_REGISTERS, b);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    (void)info;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) out = fopen(argv[i] + 4, "w");
        else if (sscanf(argv[i], "run=%" SCNx64, &run.first) == 1) run.end = run.first + 1;
        else if (sscanf(argv[i], "mark=%" SCNx64 "-%" SCNx64, &mark.first, &mark.end) == 2) continue;
        else if (sscanf(argv[i], "done=%" SCNx64 "-%" SCNx64, &done.first, &done.end) == 2) continue;
        else return -1;
    }
    if (!out || !run.first || !mark.end || !done.end) return -1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    return 0;
}
