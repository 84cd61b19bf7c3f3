/* Continues a prompt of token ids, always with the most likely token, in C99.
 *
 *     generate_c BUNDLE COUNT ID...
 *
 * Set FWL_RUNTIME to the path of libonnxruntime.so if it is not where dlopen finds it.
 */
#include <stdio.h>
#include <stdlib.h>

#include "fwl/fwl.h"

int main(int count, char** arguments) {
  fwl_error error;
  fwl_options options;
  fwl_model* model = NULL;
  fwl_session* session = NULL;
  fwl_info info = {.size = sizeof(info)};
  if (count < 4) {
    fprintf(stderr, "usage: generate_c BUNDLE COUNT ID...\n");
    return 2;
  }
  fwl_options_init(&options, sizeof(options));
  options.runtime_library = getenv("FWL_RUNTIME");
  fwl_status status = fwl_model_open(arguments[1], &options, &model, &error);
  if (status == FWL_OK)
    status = fwl_model_info(model, &info, &error);
  if (status == FWL_OK)
    status = fwl_session_open(model, 1, &session, &error);

  float* logits = calloc((size_t)info.vocab_size + 1, sizeof(float));
  int64_t* ids = calloc((size_t)count, sizeof(int64_t));
  size_t size = 0;
  for (int i = 3; i < count; ++i)
    ids[size++] = strtoll(arguments[i], NULL, 10);
  for (long left = strtol(arguments[2], NULL, 10); status == FWL_OK && left > 0; --left) {
    status = fwl_session_feed(session, ids, size, NULL, NULL, FWL_LOGITS_LAST, logits,
                              (size_t)info.vocab_size, &error);
    if (status == FWL_OK) {
      ids[0] = 0;
      for (int64_t v = 1; v < info.vocab_size; ++v) {
        if (logits[v] > logits[ids[0]])
          ids[0] = v;
      }
      size = 1;
      printf("%lld%c", (long long)ids[0], left > 1 ? ' ' : '\n');
    }
  }
  if (status != FWL_OK)
    fprintf(stderr, "error: %s\n", error.message);
  free(logits);
  free(ids);
  fwl_session_close(session);
  fwl_model_close(model);
  return status == FWL_OK ? 0 : 1;
}
