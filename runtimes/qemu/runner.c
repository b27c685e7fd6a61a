/* Runs a TVM model library on a machine without Python: samples in, outputs out.
 *
 *   runner LIBTVM_RUNTIME MODEL COUNT SAMPLES INPUTS OUTPUTS SPEC...
 *
 * INPUTS holds SAMPLES times the tensors of the SPECs ("float32:1,3,32,32") back to back; OUTPUTS receives each sample's
 * output tensors back to back. With COUNT=1 the first sample is run three times: warm-up, once between the marks 2 and 3
 * (hint #114 and #115, read by count.c), and once with the marks 0 and 1 around each kernel, whose names go to stdout in order.
 * Links libtvm_ffi only; the relax virtual machine comes with LIBTVM_RUNTIME. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tvm/ffi/c_api.h>

#if defined(__aarch64__)
#define MARK(n) __asm__ volatile("hint #%c0" ::"i"(112 + (n)) : "memory")
#else
#define MARK(n) ((void)0)
#endif

enum { MAX_INPUTS = 16, MAX_DIMS = 8 };

typedef struct {
    DLManagedTensor managed;
    int64_t shape[MAX_DIMS];
    size_t bytes;
} Input;

static void die(const char *what) {
    TVMFFIObjectHandle error = NULL;
    fprintf(stderr, "runner: %s", what);
    TVMFFIErrorMoveFromRaised(&error);
    if (error) {
        const TVMFFIErrorCell *cell = (const TVMFFIErrorCell *)((const char *)error + sizeof(TVMFFIObject));
        fprintf(stderr, ": %.*s", (int)cell->message.size, cell->message.data);
    }
    fprintf(stderr, "\n");
    exit(1);
}

static TVMFFIAny none(void) {
    TVMFFIAny any;
    memset(&any, 0, sizeof any);
    return any;
}

static TVMFFIAny integer(int64_t value) {
    TVMFFIAny any = none();
    any.type_index = kTVMFFIInt;
    any.v_int64 = value;
    return any;
}

static TVMFFIAny text(const char *value) {
    TVMFFIAny any = none();
    any.type_index = kTVMFFIRawStr;
    any.v_c_str = value;
    return any;
}

static TVMFFIAny object(int32_t type, TVMFFIObjectHandle handle) {
    TVMFFIAny any = none();
    any.type_index = type;
    any.v_obj = (TVMFFIObject *)handle;
    return any;
}

static TVMFFIAny call(TVMFFIObjectHandle function, TVMFFIAny *arguments, int count, const char *what) {
    TVMFFIAny result = none();
    if (TVMFFIFunctionCall(function, arguments, count, &result)) die(what);
    return result;
}

static TVMFFIObjectHandle global(const char *name) {
    TVMFFIByteArray key = {name, strlen(name)};
    TVMFFIObjectHandle function = NULL;
    if (TVMFFIFunctionGetGlobal(&key, &function) || !function) die(name);
    return function;
}

/* NULL when the module has no such function. */
static TVMFFIObjectHandle find(TVMFFIAny module, const char *name) {
    TVMFFIAny arguments[3] = {module, text(name), integer(0)};
    arguments[2].type_index = kTVMFFIBool;
    TVMFFIAny found = call(global("ffi.ModuleGetFunction"), arguments, 3, name);
    return found.type_index == kTVMFFIFunction ? found.v_obj : NULL;
}

static TVMFFIObjectHandle method(TVMFFIAny module, const char *name) {
    TVMFFIObjectHandle found = find(module, name);
    if (!found) die(name);
    return found;
}

/* Called by the virtual machine around every call: (function, name, before, result, arguments...). */
static int instrument(void *self, const TVMFFIAny *arguments, int32_t count, TVMFFIAny *result) {
    const TVMFFIAny *name = &arguments[1];
    const int before = (int)arguments[2].v_int64;
    (void)self, (void)count;
    result->type_index = kTVMFFIInt;
    result->zero_padding = 0;
    result->v_int64 = 0; /* go on */
    const char *data;
    size_t size;
    if (name->type_index == kTVMFFIRawStr) {
        data = name->v_c_str, size = strlen(data);
    } else if (name->type_index == kTVMFFISmallStr) {
        data = name->v_bytes, size = name->small_str_len;
    } else {
        const TVMFFIByteArray *bytes = (const TVMFFIByteArray *)((const char *)name->v_obj + sizeof(TVMFFIObject));
        data = bytes->data, size = bytes->size;
    }
    if (size >= 3 && memcmp(data, "vm.", 3) == 0) return 0; /* the machine's own bookkeeping */
    if (before) {
        printf("%.*s\n", (int)size, data);
        MARK(0);
    } else {
        MARK(1);
    }
    return 0;
}

static void parse(const char *spec, Input *input) {
    DLTensor *tensor = &input->managed.dl_tensor;
    TVMFFIByteArray dtype = {spec, strcspn(spec, ":")};
    if (TVMFFIDataTypeFromString(&dtype, &tensor->dtype)) die(spec);
    input->bytes = tensor->dtype.bits / 8u;
    const char *at = spec + dtype.size;
    while (*at && tensor->ndim < MAX_DIMS) {
        char *end;
        const int64_t size = strtoll(at + 1, &end, 10);
        input->shape[tensor->ndim++] = size;
        input->bytes *= (size_t)size;
        at = end;
    }
    tensor->shape = input->shape;
    tensor->device.device_type = kDLCPU;
    tensor->data = aligned_alloc(256, (input->bytes + 255) / 256 * 256);
    if (!tensor->data) die("out of memory");
}

static void store(TVMFFIAny value, FILE *out) {
    if (value.type_index != kTVMFFITensor) die("an output is not a tensor");
    const DLTensor *tensor = (const DLTensor *)((const char *)value.v_obj + sizeof(TVMFFIObject));
    size_t bytes = tensor->dtype.bits / 8u;
    for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
    if (fwrite(tensor->data, 1, bytes, out) != bytes) die("cannot write the outputs");
}

int main(int argc, char **argv) {
    if (argc < 8) die("usage: runner LIBTVM_RUNTIME MODEL COUNT SAMPLES INPUTS OUTPUTS SPEC...");
    if (!dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) die(dlerror());
    const int counting = atoi(argv[3]), samples = atoi(argv[4]), inputs = argc - 7;
    FILE *in = fopen(argv[5], "rb"), *out = fopen(argv[6], "wb");
    if (!in || !out) die("cannot open the inputs or outputs");
    if (inputs > MAX_INPUTS) die("too many inputs");

    TVMFFIAny path = text(argv[2]);
    TVMFFIAny library = call(global("ffi.ModuleLoadFromFile"), &path, 1, "cannot load the model");
    TVMFFIAny machine = call(method(library, "vm_load_executable"), NULL, 0, "vm_load_executable");
    TVMFFIAny setup[6] = {integer(kDLCPU), integer(0), integer(2), integer(kDLCPU), integer(0), integer(2)};
    call(method(machine, "vm_initialization"), setup, 6, "vm_initialization"); /* 2: pooled allocator */
    TVMFFIObjectHandle model = method(machine, "main");

    static Input table[MAX_INPUTS];
    TVMFFIAny arguments[MAX_INPUTS + 1];
    for (int i = 0; i < inputs; i++) {
        TVMFFIObjectHandle tensor = NULL;
        parse(argv[7 + i], &table[i]);
        if (TVMFFITensorFromDLPack(&table[i].managed, 0, 1, &tensor)) die("cannot make an input");
        arguments[i] = object(kTVMFFITensor, tensor);
    }
    int count = inputs;
    TVMFFIObjectHandle weights = find(machine, "weights"); /* there if weights are stored as codes: widens them, once */
    if (weights) arguments[count++] = call(weights, NULL, 0, "the weights failed");
    for (int sample = 0; sample < samples; sample++) {
        for (int i = 0; i < inputs; i++)
            if (fread(table[i].managed.dl_tensor.data, 1, table[i].bytes, in) != table[i].bytes) die("too few inputs");
        TVMFFIAny result = call(model, arguments, count, "the model failed");
        if (counting && sample == 0) {
            TVMFFIObjectHandle watcher = NULL;
            MARK(2);
            call(model, arguments, count, "the model failed");
            MARK(3);
            if (TVMFFIFunctionCreate(NULL, instrument, NULL, &watcher)) die("cannot make the instrument");
            TVMFFIAny watch = object(kTVMFFIFunction, watcher);
            call(method(machine, "set_instrument"), &watch, 1, "set_instrument");
            result = call(model, arguments, count, "the model failed");
        }
        if (result.type_index == kTVMFFIArray) {
            const int64_t parts = call(global("ffi.ArraySize"), &result, 1, "ArraySize").v_int64;
            for (int64_t i = 0; i < parts; i++) {
                TVMFFIAny item[2] = {result, integer(i)};
                store(call(global("ffi.ArrayGetItem"), item, 2, "ArrayGetItem"), out);
            }
        } else {
            store(result, out);
        }
        TVMFFIObjectDecRef(result.v_obj);
    }
    if (fclose(out)) die("cannot write the outputs");
    fflush(stdout);
    _Exit(0); /* no destructors: libtvm_runtime was opened by hand and is not unloaded in order */
}
