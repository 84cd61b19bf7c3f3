/* libfwl: run bundles of fwl-export in any program. Token ids in, logits out, state kept.
 *
 *   fwl_model *model;
 *   fwl_session *session;
 *   fwl_error error;
 *   if (fwl_model_open("bundle", NULL, &model, &error) != FWL_OK ||
 *       fwl_session_open(model, 1, &session, &error) != FWL_OK) {
 *     fprintf(stderr, "%s\n", error.message);
 *   }
 *   fwl_session_feed(session, ids, count, NULL, NULL, FWL_LOGITS_LAST, logits, vocab_size, &error);
 *
 * A session holds rows of text, each independent of the others. A call either succeeds and moves
 * its rows on, or returns an error and leaves all rows as they were.
 *
 * Threads: every function may be called from any thread. Calls on one session wait for each other;
 * sessions of one model run at the same time. Nothing is global. No exception leaves the library.
 */
#ifndef FWL_FWL_H
#define FWL_FWL_H

#include <stddef.h>
#include <stdint.h>

#if defined(FWL_STATIC)
#define FWL_API
#else
#define FWL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header; a program checks it against fwl_abi_version() of the library it runs with. */
#define FWL_ABI_VERSION 1

typedef enum fwl_status {
  FWL_OK = 0,
  FWL_ERROR_ARGUMENT = 1, /* a null pointer, a row that does not exist, a size that does not fit */
  FWL_ERROR_BUNDLE = 2,   /* missing, changed, of another schema, or the runtime refuses it */
  FWL_ERROR_TOKEN = 3,    /* an id, weight or length is out of range, or the output not finite */
  FWL_ERROR_STATE = 4,    /* a state file that is damaged or of another model */
  FWL_ERROR_RUNTIME = 5,  /* the backend's library is missing, or a call of it failed */
  FWL_ERROR_IO = 6,       /* a file cannot be read or written */
  FWL_ERROR_MEMORY = 7,
  FWL_ERROR_INTERNAL = 8
} fwl_status;

/* What went wrong, in one sentence. Every `error` below may be NULL. */
typedef struct fwl_error {
  fwl_status status;
  char message[1020];
} fwl_error;

/* Fill it with fwl_options_init first, so that programs go on to work when it grows. */
typedef struct fwl_options {
  size_t size;
  const char* backend; /* "onnxruntime"; "tensorrt"; "auto": TensorRT where its library, a GPU
                          and an engine for both are there, else ONNX Runtime */
  const char* runtime_library;  /* path of libonnxruntime.so; NULL: by name, as dlopen finds it */
  const char* plugin;           /* path of libfwl_ort.so, our kernel; NULL: standard operators */
  int32_t threads;              /* of ONNX Runtime inside one operator; 0: it chooses */
  int32_t device;               /* the GPU's number, from 0 */
  const char* tensorrt_library; /* path of libnvinfer.so; NULL: by name, as dlopen finds it */
  const char*
      tensorrt_plugin; /* path of libfwl_trt.so; NULL: beside libfwl, if an engine needs it */
  int32_t allow_embedded_plugin; /* 1: an engine may bring code for this process; 0: it may not */
} fwl_options;

typedef struct fwl_info {
  size_t size; /* of this structure, to be set by the caller */
  int64_t vocab_size;
  int64_t max_tokens;      /* largest call of the model; longer reads are split */
  int64_t anchor_interval; /* 0: none */
  size_t state_bytes;      /* of one row */
  char model_id[65];
  char precision[8]; /* "fp32" or "fp16", of the activations */
  char backend[16];  /* that runs the model */
  char engine[128];  /* of TensorRT: its name in the bundle; else "" */
} fwl_info;

typedef enum fwl_logits {
  FWL_LOGITS_NONE = 0, /* read only */
  FWL_LOGITS_LAST = 1, /* [rows, V]: after each row's last token; zeros where it brought none */
  FWL_LOGITS_ALL = 2   /* [rows, tokens, V]; zeros at padding */
} fwl_logits;

typedef struct fwl_model fwl_model;
typedef struct fwl_session fwl_session;

FWL_API uint32_t fwl_abi_version(void);
FWL_API const char* fwl_version(void);

/* Sets what a program does not; `size` is the program's sizeof(fwl_options). */
FWL_API void fwl_options_init(fwl_options* options, size_t size);

/* Checks and loads a bundle. `options` may be NULL. */
FWL_API fwl_status fwl_model_open(const char* bundle, const fwl_options* options, fwl_model** model,
                                  fwl_error* error);
/* Fills as much of `info` as its size says. */
FWL_API fwl_status fwl_model_info(const fwl_model* model, fwl_info* info, fwl_error* error);
/* Its sessions may outlive it. NULL is no error, here and in fwl_session_close. */
FWL_API void fwl_model_close(fwl_model* model);

/* Opens a session of fresh rows. */
FWL_API fwl_status fwl_session_open(fwl_model* model, size_t rows, fwl_session** session,
                                    fwl_error* error);
FWL_API void fwl_session_close(fwl_session* session);

/* Reads the next tokens of every row.
 *
 *   tokens         [rows, count]; ids from 0 to V - 1
 *   count          1 or more
 *   label_weights  [rows, count], how much to learn from each token, 0 = read only; NULL: 1
 *   lengths        [rows], real tokens of each row, 0 to count, the rest is padding; NULL: count
 *   which          logits that are wanted
 *   logits         room for them, in float32; may be NULL for FWL_LOGITS_NONE
 *   logits_size    floats that there is room for
 */
FWL_API fwl_status fwl_session_feed(fwl_session* session, const int64_t* tokens, size_t count,
                                    const float* label_weights, const int64_t* lengths,
                                    fwl_logits which, float* logits, size_t logits_size,
                                    fwl_error* error);

/* How many tokens each row has read: [rows]. */
FWL_API fwl_status fwl_session_positions(fwl_session* session, int64_t* positions,
                                         fwl_error* error);

/* What the model's step sizes are multiplied by, [rows], 1 at first. It counts for what is read
 * from then on: what was learned before stays, and forgetting does not change. A reset leaves it.
 */
FWL_API fwl_status fwl_session_set_learning_rate_scale(fwl_session* session, const float* scale,
                                                       fwl_error* error);

/* Makes rows fresh. `rows` NULL and `count` 0: all, here and below; no rows, where `rows` is not
 * NULL, are refused. */
FWL_API fwl_status fwl_session_reset(fwl_session* session, const size_t* rows, size_t count,
                                     fwl_error* error);

/* Copies a row's state to other rows: one document read once, many continuations. */
FWL_API fwl_status fwl_session_fork(fwl_session* session, size_t source, const size_t* targets,
                                    size_t count, fwl_error* error);

/* Copies a row's state out and in; `size` is fwl_info.state_bytes. Only for this model. */
FWL_API fwl_status fwl_session_read_row(fwl_session* session, size_t row, void* state, size_t size,
                                        fwl_error* error);
FWL_API fwl_status fwl_session_write_row(fwl_session* session, size_t row, const void* state,
                                         size_t size, fwl_error* error);

/* State files are those of Python: read a document there, go on here. Compressed ones are read,
 * plain ones written. The file holds as many rows as are given. */
FWL_API fwl_status fwl_session_save_state(fwl_session* session, const char* path,
                                          const size_t* rows, size_t count, fwl_error* error);
FWL_API fwl_status fwl_session_load_state(fwl_session* session, const char* path,
                                          const size_t* rows, size_t count, fwl_error* error);

#ifdef __cplusplus
}
#endif

#endif
