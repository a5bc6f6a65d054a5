// Softmax over store, ring and fresh tokens, split into tasks that keep all cores busy.
#pragma once

#include "codes/decode.h"
#include "rows/decode.h"
#include "rows/int8.h"
#include "step/mass.h"

// the tile of floats in x->tile, in as many bfloat16 parts where products run in bfloat16
static void attend_floats(const Call& c, const Task& t, int count, int parts, int causal_from, Scratch* x, Softmax* s) {
  const int d = c.layout.head_size, group = heads_per_query(c), rows = t.queries * group;
  if (!splits_floats(c)) return attend_tile(x->tile, count, x->query, rows, d, s, x->score, causal_from, group);
  keys_to_bf16(x->tile, d, count, parts, &x->bf16);
  values_to_bf16(x->tile, d, count, &x->bf16);
  bf16_attend_tile(&x->bf16, count, rows, d, s, x->score, causal_from, group);
}

static void attend_rows(const Call& c, const Task& t, const KvRows& rows, int causal_from, Scratch* x,
                        Softmax* s, Fetch* fetch) {
  const int d = c.layout.head_size;
  if (t.queries == 1) {
    decode_rows(rows, Query{x->query, heads_per_query(c)}, d, s, fetch);
  } else {
    tile_keys_from_rows(rows, d, &x->tile);
    tile_values_from_rows(rows, d, &x->tile);
    attend_floats(c, t, rows.key.count, parts_of_rows(c, rows), causal_from, x, s);
  }
}

// whether few bits become one bfloat16 number, without floats between
static bool codes_to_bf16(const Call& c, const Task& t) {
  return PARTS > 0 && t.queries > 1 && c.rounding && c.layout.k_bits < 8 && c.layout.v_bits < 8;
}

static void attend_codes(const Call& c, const Task& t, const uint8_t* run, int first, int n, Scratch* x, Softmax* s) {
  const Layout& l = c.layout;
  const int group = heads_per_query(c);
  if (codes_to_bf16(c, t)) {
    bf16_tile_from_codes(l, run, first, n, &x->bf16);
    bf16_attend_tile(&x->bf16, n, t.queries * group, l.head_size, s, x->score, SEES_ALL, group);
  } else {
    tile_keys_from_codes(l, run, first, n, &x->tile);
    tile_values_from_codes(l, run, first, n, &x->tile);
    attend_floats(c, t, n, 2, SEES_ALL, x, s);
  }
}

// fetch: the run that will be read next
static void attend_page(const Call& c, const Task& t, const uint8_t* run, int count, Scratch* x, Softmax* s,
                        Fetch* fetch) {
  const Layout& l = c.layout;
  const Query query = {x->query, heads_per_query(c)};
  if (t.queries == 1 && c.rounding && has_integer_dot(l)) {
    decode_codes(l, run, count, query, s, fetch);
    return;
  }
  for (int first = 0; first < count; first += TILE) {
    const int n = min_int(TILE, count - first);
    if (l.kind == Kind::affine) {
      attend_codes(c, t, run, first, n, x, s);
    } else {
      KvRows rows;
      page_rows(c, run, first, n, &rows);
      if (t.queries == 1 && c.rounding && has_int8_dot(l)) decode_int8(rows, query, l.head_size, s, fetch);
      else attend_rows(c, t, rows, SEES_ALL, x, s, fetch);
    }
  }
}

static void attend_recent(const Call& c, const Task& t, Scratch* x, Softmax* s) {
  KvRows rows;
  Fetch none = {nullptr, nullptr, 0};
  for (int first = 0; first < c.batch.ring[t.seq]; first += TILE) {
    ring_rows(c, t.seq, t.head, first, min_int(TILE, c.batch.ring[t.seq] - first), &rows);
    attend_rows(c, t, rows, SEES_ALL, x, s, &none);
  }
  const int fresh = t.query_from + t.queries;  // the last query of the task sees these
  for (int first = 0; first < fresh; first += TILE) {
    fresh_rows(c, t.seq, t.head, first, min_int(TILE, fresh - first), &rows);
    attend_rows(c, t, rows, t.query_from - first, x, s, &none);
  }
}

// a sink takes its share of the softmax and has no value
static void add_sinks(const Call& c, const Task& t, Softmax* s) {
  const int d = c.layout.head_size, group = heads_per_query(c);
  for (int r = 0; r < t.queries * group; r++) {
    const float sink = c.sinks[t.head * group + r % group] * LOG2_E;
    const float top = max_float(s->top[r], sink), shrink = exp2f(s->top[r] - top);
    s->top[r] = top;
    s->sum[r] = s->sum[r] * shrink + exp2f(sink - top);
    for (int j = 0; j < d; j++) s->out[int64_t(r) * d + j] *= shrink;
  }
}

static void write_output(const Call& c, const Task& t, Softmax* s, const Denominators& z) {
  const int d = c.layout.head_size, group = heads_per_query(c);
  if (c.sinks) add_sinks(c, t, s);
  for (int r = 0; z.log2 && r < t.queries * group; r++) {
    const int query = t.query_from + r / group - c.mass.first_query[t.seq];
    if (query < 0 || c.mass.place[t.seq] < 0) continue;
    z.log2[(z.offset[t.seq] + query) * c.num_heads + t.head * group + r % group] = s->top[r] + log2f(s->sum[r]);
  }
  for (int r = 0; r < t.queries * group; r++) {
    float* row = s->out + int64_t(r) * d;
    for (int j = 0; j < d; j++) row[j] /= s->sum[r];
    rotate_row(c.layout, row);
    const int64_t token = c.batch.query_start[t.seq] + t.query_from + r / group;
    store_row(const_cast<char*>(tensor_row(c, c.output, token, t.head * group + r % group)), c.dtype, d, row);
  }
}

static void run_task(const Call& c, const Task& t, Scratch* x, float* partial, const Denominators& z) {
  const Layout& l = c.layout;
  const int d = l.head_size, rows = t.queries * heads_per_query(c), stored = c.batch.stored[t.seq];
  Softmax s = {x->top, x->sum, x->out, c.soft_cap * LOG2_E};
  load_queries(c, t, x->query);
  if (splits_floats(c) || codes_to_bf16(c, t)) queries_to_bf16(x->query, rows, d, &x->bf16);
  softmax_begin(&s, rows, d);
  for (int i = t.page_from; i < t.page_to; i++) {
    const int page = c.store_page(t.seq, t.head, t.query_from, i), count = min_int(l.page_tokens, stored - page * l.page_tokens);
    const uint8_t* run = c.store_run(t.seq, page, t.head);
    const uint8_t* next = i + 1 < t.page_to ? c.store_run(t.seq, c.store_page(t.seq, t.head, t.query_from, i + 1), t.head) : run;
    Fetch fetch = {next, next == run ? next : next + l.run_bytes, 0};
    attend_page(c, t, run, count, x, &s, &fetch);
  }
  if (t.last) attend_recent(c, t, x, &s);
  if (t.partial < 0) {
    write_output(c, t, &s, z);
    return;
  }
  float* out = partial + t.partial * (d + 2);
  for (int r = 0; r < rows; r++, out += d + 2) {
    out[0] = s.top[r], out[1] = s.sum[r];
    memcpy(out + 2, s.out + int64_t(r) * d, sizeof(float) * size_t(d));
  }
}

// joins the partial results of `splits` consecutive tasks, the first being t
static void join_task(const Call& c, const Task* t, int splits, Scratch* x, const float* partial,
                      const Denominators& z) {
  const int d = c.layout.head_size, rows = t->queries * heads_per_query(c);
  Softmax s = {x->top, x->sum, x->out, 0.f};
  softmax_begin(&s, rows, d);
  for (int r = 0; r < rows; r++) {
    for (int i = 0; i < splits; i++) s.top[r] = max_float(s.top[r], partial[(t[i].partial + r) * (d + 2)]);
    for (int i = 0; i < splits; i++) {
      const float* p = partial + (t[i].partial + r) * (d + 2);
      const float weight = exp2f(p[0] - s.top[r]);
      s.sum[r] += weight * p[1];
      for (int j = 0; j < d; j++) s.out[int64_t(r) * d + j] += weight * p[2 + j];
    }
  }
  write_output(c, *t, &s, z);
}

// work of a task, in query rows x tokens
static double work(const Call& c, int seq, int head, int query, int queries) {
  const double pages = c.store_pages(seq, head, query);
  const double tokens = pages * c.layout.page_tokens + c.batch.ring[seq] + query + 0.5 * queries + 64;
  return tokens * queries * heads_per_query(c);
}

// calls `use` with sequence, KV head, first query and number of queries of every block of rows
template <class Use>
static void for_blocks(const Call& c, Use use) {
  const Batch& b = c.batch;
  const int block = max_int(1, MAX_ROWS / heads_per_query(c));
  for (int s = 0; s < b.num_seqs; s++) {
    const int fresh = b.query_start[s + 1] - b.query_start[s];
    for (int q = 0, queries; q < fresh; q += queries) {
      queries = min_int(min_int(block, fresh - q), c.same_reads(q));
      for (int h = 0; h < c.num_kv_heads; h++) use(s, h, q, queries);
    }
  }
}

struct Tasks {
  int count;
  int64_t partial_rows;
};

// tasks of all sequences into `tasks`, or only their number
static Tasks split_work(const Call& c, Task* tasks) {
  double total = 0;
  for_blocks(c, [&](int s, int h, int q, int queries) { total += work(c, s, h, q, queries); });
  const double target = total / (c.num_threads * 6.0);  // a task's share, so that cores end together
  Tasks n = {0, 0};
  for_blocks(c, [&](int s, int h, int q, int queries) {
    const int pages = c.store_pages(s, h, q);
    const int wanted = c.num_threads > 1 ? int(work(c, s, h, q, queries) / target) : 1;
    const int splits = max_int(1, min_int(wanted, pages / 2));
    for (int i = 0; i < splits; i++, n.count++) {
      const int64_t partial = splits > 1 ? n.partial_rows : -1;
      if (tasks)
        tasks[n.count] = Task{s, h, q, queries, pages * i / splits, pages * (i + 1) / splits, i == splits - 1, partial};
      if (splits > 1) n.partial_rows += queries * heads_per_query(c);
    }
  });
  return n;
}

// false: no memory
static bool attend_call(const Call& c) {
  const Tasks n = split_work(c, nullptr);
  const bool counts = c.mass.first_query != nullptr;
  Array<Task> tasks(n.count);
  Array<float> partial(n.partial_rows * (c.layout.head_size + 2));
  Array<int64_t> offset(counts ? c.batch.num_seqs : 0);
  if (!tasks.ok() || !partial.ok() || !offset.ok()) return false;
  split_work(c, tasks.data);
  Array<float> log2(counts ? counted_queries(c, offset.data) * c.num_heads : 0);
  if (!log2.ok()) return false;
  const Denominators z = {counts ? log2.data : nullptr, offset.data};
  bool failed = false;
#pragma omp parallel num_threads(c.num_threads) reduction(|| : failed)
  {
    const MatrixRegisters registers;
    Scratch* x = thread_scratch();
    failed = !x;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n.count; i++)
      if (x) run_task(c, tasks[i], x, partial.data, z);
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < n.count; i++)
      if (x && tasks[i].partial >= 0 && tasks[i].page_from == 0) {
        int splits = 1;
        while (!tasks[i + splits - 1].last) splits++;
        join_task(c, tasks.data + i, splits, x, partial.data, z);
      }
  }
  return !failed && (!counts || count_mass(c, z));
}

// false: no memory
static bool attend(const Call& c) {
  if (!c.layout.rotation && !c.key_offset) return attend_call(c);
  const int64_t items = int64_t(c.batch.query_start[c.batch.num_seqs]) * c.num_kv_heads * c.layout.head_size;
  Array<float> key(items), value(items);
  if (!key.ok() || !value.ok()) return false;
  Call entered = c;
  entered.key = enter_fresh(c, c.key, true, key.data);
  entered.value = enter_fresh(c, c.value, false, value.data);
  entered.fresh_dtype = Dtype::f32;
  return attend_call(entered);
}
