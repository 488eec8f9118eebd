// A persistent pool of worker threads. Calls from several threads take turns; a call from inside a task runs
// serially.
#pragma once
#include <stdint.h>

void parallel_for(int64_t n, void (*fn)(void *ctx, int64_t i), void *ctx);
int thread_count();
void set_thread_count(int n);
