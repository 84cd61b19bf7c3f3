/**
 * @file
 * libfwl runs the bundles of fwl-export in any program: it takes token ids, returns logits and
 * keeps the state.
 *
 *     fwl_model *model;
 *     fwl_session *session;
 *     fwl_error error;
 *     if (fwl_model_open("bundle", NULL, &model, &error) != FWL_OK ||
 *         fwl_session_open(model, 1, &session, &error) != FWL_OK ||
 *         fwl_session_feed(session, ids, count, NULL, NULL, FWL_LOGITS_LAST, logits, vocab_size,
 *                          &error) != FWL_OK) {
 *       fprintf(stderr, "%s\n", error.message);
 *     }
 *
 * A session holds `rows` independent texts, one per row. A call either succeeds and advances its
 * rows, or returns an error and leaves every row and every output argument as it was.
 *
 * Conventions: arrays are contiguous, in row-major order, and stay the caller's; the library copies
 * what it needs before a call returns. V is the size of the vocabulary. Functions that can fail
 * return a status; `error` may be NULL, else it receives the status and a message. Any of these
 * functions may also return FWL_ERROR_MEMORY or FWL_ERROR_INTERNAL; the comments name the others.
 *
 * Threads: every function may be called from any thread. Calls on one session wait for each other;
 * sessions of one model run at the same time. The library has no global state, and no C++ exception
 * leaves it. When it is loaded, it sets ORT_DISABLE_TELEMETRY=1 in the environment unless that
 * variable is set, because ONNX Runtime's builds for Linux report to Microsoft.
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

/** Version of the binary interface in this header. Compare it with fwl_abi_version(). */
#define FWL_ABI_VERSION 1

/** What a function returns. */
typedef enum fwl_status {
  FWL_OK = 0,
  /** A pointer is NULL, a row does not exist, or a size or option does not fit. */
  FWL_ERROR_ARGUMENT = 1,
  /** The bundle is missing, was changed, has another schema, or the runtime refuses it. */
  FWL_ERROR_BUNDLE = 2,
  /**
   * A token id, weight or length is out of range, the model's output is not finite, or a row would
   * have learned too much.
   */
  FWL_ERROR_TOKEN = 3,
  /** A state or state file is damaged, holds NaN, is of another model, or has learned too much. */
  FWL_ERROR_STATE = 4,
  /** A library that the runtime needs is missing, or a call of it failed. */
  FWL_ERROR_RUNTIME = 5,
  /** A file cannot be read or written. */
  FWL_ERROR_IO = 6,
  /** There is not enough memory, in the host or on the GPU. */
  FWL_ERROR_MEMORY = 7,
  /** A bug in libfwl. */
  FWL_ERROR_INTERNAL = 8
} fwl_status;

/** What went wrong. After a call that succeeds: FWL_OK and an empty message. */
typedef struct fwl_error {
  fwl_status status;
  char message[1020]; /**< One or two sentences in UTF-8, ending with a zero byte. */
} fwl_error;

/**
 * How to open a model. Call fwl_options_init before setting fields: later versions of the library
 * add fields at the end, and programs built with this header keep working. Strings must stay valid
 * until fwl_model_open returns.
 */
typedef struct fwl_options {
  /** sizeof(fwl_options) of the program; set by fwl_options_init. */
  size_t size;
  /**
   * Name of the runtime, which runs the model: "onnxruntime" (the default) on the CPU, "tensorrt"
   * on an NVIDIA GPU, or "auto": TensorRT if its library, a GPU and an engine for both are there,
   * else ONNX Runtime.
   */
  const char* backend;
  /** Path of libonnxruntime.so. NULL: search for it by name, as dlopen does. */
  const char* runtime_library;
  /** Path of libfwl_ort.so, fwl's kernel for ONNX Runtime. NULL: use standard operators only. */
  const char* plugin;
  /** Threads that ONNX Runtime uses inside an operator. 0: ONNX Runtime chooses. */
  int32_t threads;
  /** Number of the GPU, from 0. */
  int32_t device;
  /** Path of libnvinfer.so. NULL: search for it by name, as dlopen does. */
  const char* tensorrt_library;
  /** Path of libfwl_trt.so, fwl's TensorRT plugin. NULL: the one beside libfwl, if needed. */
  const char* tensorrt_plugin;
  /**
   * 1: load the plugin that an engine may carry, which is code of the bundle that runs in this
   * process; set it only for bundles that you trust. 0 (the default): refuse such engines.
   */
  int32_t allow_embedded_plugin;
  /**
   * Largest product of a token's label weight and its row's learning-rate scale, and largest scale.
   * 0 (the default): 10. Infinity: no limit. A token with a product of 1000 or more can spoil the
   * predictions of all that follow.
   */
  double max_learning_weight;
  /**
   * Largest norm of what a row has learned, see fwl_session_learned; a call or a state that exceeds
   * it is refused. 0 (the default) or infinity: no limit, at no cost.
   */
  double max_update_norm;
  /**
   * Norm to which what a row has learned is scaled down, if it is larger, after every 32 tokens of
   * the row: for those who cannot refuse a text. Calls of the model are then no longer than that. 0
   * (the default) or infinity: nothing is clipped, at no cost.
   */
  double clip_update_norm;
} fwl_options;

/** What a loaded model is. */
typedef struct fwl_info {
  size_t size;             /**< sizeof(fwl_info); set it before the call. */
  int64_t vocab_size;      /**< V. */
  int64_t max_tokens;      /**< The most tokens in one call of the model; longer feeds are split. */
  int64_t anchor_interval; /**< Tokens between two anchors of the fast weights; 0: no anchors. */
  size_t state_bytes;      /**< Bytes of one row's state. */
  char model_id[65];       /**< Identifies weights and precision; state fits models of equal id. */
  char precision[8];       /**< Type of the activations, "fp32" or "fp16". */
  char backend[16];        /**< Name of the runtime: "onnxruntime" or "tensorrt". */
  char engine[128];        /**< TensorRT: name of the engine in the bundle. Else "". */
} fwl_info;

/** Which logits a feed returns. */
typedef enum fwl_logits {
  FWL_LOGITS_NONE = 0, /**< None: the model reads and learns. */
  FWL_LOGITS_LAST = 1, /**< [rows, V]: after the last token of each row; zeros for empty rows. */
  FWL_LOGITS_ALL = 2   /**< [rows, count, V]: after every token; zeros at padding. */
} fwl_logits;

/** A loaded bundle. */
typedef struct fwl_model fwl_model;
/** Rows of text on a model. */
typedef struct fwl_session fwl_session;

/** Returns the FWL_ABI_VERSION of the library; a program should check it against its header's. */
FWL_API uint32_t fwl_abi_version(void);

/** Returns the version of the library, such as "0.1.0". The string is static. */
FWL_API const char* fwl_version(void);

/**
 * Sets all options to their defaults.
 *
 * @param options  Structure to initialize. If NULL, nothing happens.
 * @param size     sizeof(fwl_options) of the calling program.
 */
FWL_API void fwl_options_init(fwl_options* options, size_t size);

/**
 * Checks and loads a bundle.
 *
 * @param bundle   Path of the bundle's folder.
 * @param options  Options after fwl_options_init; NULL: the defaults.
 * @param model    Receives the model, or NULL if the call fails. Close it with fwl_model_close.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for options that are not valid, FWL_ERROR_BUNDLE, or
 * FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_model_open(const char* bundle, const fwl_options* options, fwl_model** model,
                                  fwl_error* error);

/**
 * Describes a model.
 *
 * @param model  The model.
 * @param info   Structure whose `size` the caller has set; only that many bytes are written.
 * @param error  Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT if `size` is smaller than any version of fwl_info.
 */
FWL_API fwl_status fwl_model_info(const fwl_model* model, fwl_info* info, fwl_error* error);

/** Closes a model. Its sessions may still be used after that. NULL is allowed. */
FWL_API void fwl_model_close(fwl_model* model);

/**
 * Opens a session, whose rows have read nothing yet.
 *
 * @param model    The model. The session keeps it loaded.
 * @param rows     Number of rows, 1 to 1048576; a TensorRT engine may set a lower limit.
 * @param session  Receives the session, or NULL if the call fails. Close it with fwl_session_close.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for `rows` out of range, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_open(fwl_model* model, size_t rows, fwl_session** session,
                                    fwl_error* error);

/** Closes a session. NULL is allowed. */
FWL_API void fwl_session_close(fwl_session* session);

/**
 * Reads the next tokens of every row, learns from them, and predicts the tokens that follow.
 *
 * @param session        The session.
 * @param tokens         [rows, count] token ids, 0 to V - 1. Padding may hold any value.
 * @param count          Tokens per row in the arrays, 1 or more. Any number: long feeds are split.
 * @param label_weights  [rows, count] how much to learn from each token, finite and 0 or more; 0
 *                       reads the token without learning. NULL: 1 everywhere. Times the row's
 *                       learning-rate scale it is at most fwl_options.max_learning_weight.
 * @param lengths        [rows] number of real tokens in each row, 0 to `count`; the rest of the row
 *                       is padding. A row of length 0 stays as it is. NULL: `count` everywhere.
 * @param which          Which logits to return.
 * @param logits         Receives the logits as float32, in the shape that `which` says. May be NULL
 *                       with FWL_LOGITS_NONE.
 * @param logits_size    Number of floats that `logits` has room for.
 * @param error          Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for a missing array or too little room, FWL_ERROR_TOKEN for values out
 *         of range, a row beyond the model's last position, an output that is not finite or a row
 *         that would have learned more than fwl_options.max_update_norm, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_feed(fwl_session* session, const int64_t* tokens, size_t count,
                                    const float* label_weights, const int64_t* lengths,
                                    fwl_logits which, float* logits, size_t logits_size,
                                    fwl_error* error);

/**
 * Tells how many tokens each row has read.
 *
 * @param session    The session.
 * @param positions  Receives [rows] numbers.
 * @param error      Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT if a pointer is NULL.
 */
FWL_API fwl_status fwl_session_positions(fwl_session* session, int64_t* positions,
                                         fwl_error* error);

/**
 * Sets the factors by which the model's learning rates are multiplied. They apply to what is read
 * from now on: what a row has learned stays, and how fast it forgets does not change. Factors
 * belong to the rows of the session, not to the texts in them: reset, fork and load leave them
 * alone.
 *
 * @param session  The session.
 * @param scale    [rows] factors, finite, 0 or more, and at most fwl_options.max_learning_weight;
 *                 1 in a new session, 0 to stop learning.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for NULL or values out of range.
 */
FWL_API fwl_status fwl_session_set_learning_rate_scale(fwl_session* session, const float* scale,
                                                       fwl_error* error);

/**
 * Tells how much each row has learned: the norm of its sums of gradients, which the model
 * multiplies by its step sizes and adds to the trained weights. The norms have no unit, and compare
 * texts and rows of one model, not models. A fresh row has 0. Watch them, and put back a state that
 * fwl_session_read_row has returned when a row has learned too much.
 *
 * @param session  The session.
 * @param norms    Receives [rows] numbers: the root of the sum of the squares of all tensors
 *                 `fast.*` of the row's state.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT if a pointer is NULL, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_learned(fwl_session* session, double* norms, fwl_error* error);

/**
 * Makes rows fresh, as if they had read nothing.
 *
 * @param session  The session.
 * @param rows     [count] distinct numbers of rows, from 0. NULL with a `count` of 0: all rows.
 * @param count    How many rows are named. 0 is an error if `rows` is not NULL.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for rows that do not exist or are named twice, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_reset(fwl_session* session, const size_t* rows, size_t count,
                                     fwl_error* error);

/**
 * Copies one row's state to other rows: read a document once, then continue it in many ways.
 *
 * @param session  The session.
 * @param source   Row to copy from.
 * @param targets  [count] distinct numbers of the rows to copy to.
 * @param count    How many rows are named, 1 or more.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for rows that do not exist or are named twice, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_fork(fwl_session* session, size_t source, const size_t* targets,
                                    size_t count, fwl_error* error);

/**
 * Copies a row's state out. It can be written to any row of any session whose model has the same
 * `model_id`, on a machine of the same byte order.
 *
 * @param session  The session.
 * @param row      Row to read.
 * @param state    Receives the state.
 * @param size     Bytes at `state`; must be fwl_info.state_bytes.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for a row that does not exist or another size, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_read_row(fwl_session* session, size_t row, void* state, size_t size,
                                        fwl_error* error);

/**
 * Replaces a row's state by one that fwl_session_read_row has returned.
 *
 * @param session  The session.
 * @param row      Row to write.
 * @param state    The state.
 * @param size     Bytes at `state`; must be fwl_info.state_bytes.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for a row that does not exist or another size, FWL_ERROR_STATE for
 *         values that are not finite, a position out of range, or more learned than
 *         fwl_options.max_update_norm, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_write_row(fwl_session* session, size_t row, const void* state,
                                         size_t size, fwl_error* error);

/**
 * Saves the state of rows to a file, which Python can load too. An existing file is replaced only
 * once the new one is complete and on the disk; a link stays, and what it points to is replaced.
 * State is saved without compression.
 *
 * @param session  The session.
 * @param path     Path of the file to write.
 * @param rows     [count] distinct numbers of rows, in the file's order. NULL with a `count` of 0:
 *                 all rows.
 * @param count    How many rows are named. 0 is an error if `rows` is not NULL.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for rows that do not exist or are named twice, FWL_ERROR_STATE for a
 *         state that is not finite, FWL_ERROR_IO, or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_save_state(fwl_session* session, const char* path,
                                          const size_t* rows, size_t count, fwl_error* error);

/**
 * Loads the state of rows from a file that this library or Python saved, compressed or not. Sizes
 * are compared with the session before memory is taken, and the file's sha256 is checked.
 *
 * @param session  The session.
 * @param path     Path of the file to read.
 * @param rows     [count] distinct numbers of rows; the file's first row goes to rows[0], and so
 * on. NULL with a `count` of 0: all rows.
 * @param count    How many rows are named, exactly as many as the file holds.
 * @param error    Receives the error; may be NULL.
 * @return FWL_ERROR_ARGUMENT for rows that do not exist, are named twice or are not as many as the
 *         file holds, FWL_ERROR_STATE for a file that is damaged or of another model, FWL_ERROR_IO,
 *         or FWL_ERROR_RUNTIME.
 */
FWL_API fwl_status fwl_session_load_state(fwl_session* session, const char* path,
                                          const size_t* rows, size_t count, fwl_error* error);

#ifdef __cplusplus
}
#endif

#endif
