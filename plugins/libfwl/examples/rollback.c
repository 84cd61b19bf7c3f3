/* Reads a text that nobody has checked, and takes it back if it taught too much, in C99.
 *
 *     rollback BUNDLE FACTOR ID...
 *
 * Reads the ids once, then ten times as heavily, as an attacker would ask for. Takes the second
 * reading back if it multiplied the norm of what was learned by more than FACTOR. Prints the norm
 * after each step. Set FWL_RUNTIME to the path of libonnxruntime.so if dlopen does not find it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "fwl/fwl.h"

static void check(fwl_status status, const fwl_error* error) {
  if (status != FWL_OK) {
    fprintf(stderr, "error: %s\n", error->message);
    exit(1);
  }
}

int main(int count, char** arguments) {
  if (count < 4) {
    fprintf(stderr, "usage: rollback BUNDLE FACTOR ID...\n");
    return 2;
  }
  fwl_error error;
  fwl_options options;
  fwl_model* model;
  fwl_session* session;
  fwl_info info = {.size = sizeof(info)};
  fwl_options_init(&options, sizeof(options));
  options.runtime_library = getenv("FWL_RUNTIME");
  check(fwl_model_open(arguments[1], &options, &model, &error), &error);
  check(fwl_model_info(model, &info, &error), &error);
  check(fwl_session_open(model, 1, &session, &error), &error);

  const size_t size = (size_t)count - 3;
  int64_t* ids = calloc(size, sizeof(int64_t));
  float* weights = calloc(size, sizeof(float));
  void* checkpoint = malloc(info.state_bytes);
  for (size_t i = 0; i < size; ++i) {
    ids[i] = strtoll(arguments[3 + i], NULL, 10);
    weights[i] = 10;
  }
  double usual, norm; /* one number for each row; this session has one row */
  check(fwl_session_feed(session, ids, size, NULL, NULL, FWL_LOGITS_NONE, NULL, 0, &error), &error);
  check(fwl_session_learned(session, &usual, &error), &error);
  check(fwl_session_read_row(session, 0, checkpoint, info.state_bytes, &error), &error);
  check(fwl_session_feed(session, ids, size, weights, NULL, FWL_LOGITS_NONE, NULL, 0, &error),
        &error);
  check(fwl_session_learned(session, &norm, &error), &error);
  printf("%g %g", usual, norm);
  if (norm > strtod(arguments[2], NULL) * usual)
    check(fwl_session_write_row(session, 0, checkpoint, info.state_bytes, &error), &error);
  check(fwl_session_learned(session, &norm, &error), &error);
  printf(" %g\n", norm);
  free(ids);
  free(weights);
  free(checkpoint);
  fwl_session_close(session);
  fwl_model_close(model);
  return 0;
}
