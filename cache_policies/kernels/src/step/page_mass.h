// Attention that whole store pages get from a few queries: what a sparse prefill chooses pages by.
// One pass over the keys: per row and page the logarithm of its sum, divided at the end.
#pragma once

#include "step/mass.h"

// the i-th of the queries of a block that are compared: the last of equal parts
static int sampled_query(const int32_t* block, int parts, int i) { return block[1] + (i + 1) * block[2] / parts - 1; }

// Consecutive samples of blocks of one sequence, as many as fit into a tile's rows.
struct SampleTask {
  int seq, head, block, blocks;
};

struct SampledRows {
  int query[MAX_ROWS], block[MAX_ROWS];  // of each sample
  int count;                             // samples; each is a row for every query head
};

static void load_samples(const Call& c, const SampleTask& t, const SampledRows& rows, float* out) {
  const int d = c.layout.head_size, group = heads_per_query(c);
  for (int i = 0; i < rows.count; i++)
    load_queries(c, Task{t.seq, t.head, rows.query[i], 1, 0, 0, false, -1}, out + int64_t(i) * group * d);
}

// adds 2^score of the visible tokens to a running sum under a running maximum
static void add_scores(float* score, int visible, float* top, float* sum) {
  const int padded = (visible + FW - 1) / FW * FW;
  for (int t = visible; t < padded; t++) score[t] = -1e30f;
  fw most = Wide::load(score);
  for (int t = FW; t < padded; t += FW) most = Wide::max(most, Wide::load(score + t));
  const float now = max_float(*top, Wide::hmax(most));
  fw total = Wide::set(0.f);
  for (int t = 0; t < padded; t += FW) total = total + fw_exp2(Wide::load(score + t) - Wide::set(now));
  *sum = *sum * (*top > -1e29f ? exp2f(*top - now) : 0.f) + Wide::sum(total);
  *top = now;
}

static void add_tile(const Call& c, const MassTask& tile, const SampledRows& rows, Scratch* x) {
  const int group = heads_per_query(c);
  load_keys(c, tile, x);
  score_tile(c, tile.count, rows.count * group, x);
  for (int r = 0; r < rows.count * group; r++) {
    const int sees = tile.part == Part::fresh ? rows.query[r / group] - tile.first + 1 : tile.count;
    const int visible = min_int(tile.count, sees);
    if (visible <= 0) continue;
    if (c.soft_cap > 0.f) soft_cap_row(x->score + r * TILE, visible, c.soft_cap * LOG2_E);
    add_scores(x->score + r * TILE, visible, x->top + r, x->sum + r);
  }
}

static void begin_sums(int rows, Scratch* x) {
  for (int r = 0; r < rows; r++) x->top[r] = -1e30f, x->sum[r] = 0.f;
}

// ends a page, or ring and fresh tokens together: log2 of the rows' sums, `stride` apart
static void end_sums(int rows, const Scratch* x, float* log2, int64_t stride) {
  for (int r = 0; r < rows; r++) log2[r * stride] = x->sum[r] > 0 ? x->top[r] + log2f(x->sum[r]) : -1e30f;
}

// log2 [rows, pages + 1], the last column for ring and fresh tokens
static void sum_by_page(const Call& c, const SampleTask& t, const SampledRows& rows, int pages, float* log2, Scratch* x) {
  const Layout& l = c.layout;
  const int n = rows.count * heads_per_query(c), stored = c.batch.stored[t.seq];
  for (int p = 0; p < pages; p++) {
    const int from = p * l.page_tokens, end = min_int(from + l.page_tokens, stored);
    begin_sums(n, x);
    for (int first = from; first < end; first += TILE)
      add_tile(c, {t.seq, t.head, Part::store, first, min_int(TILE, end - first)}, rows, x);
    end_sums(n, x, log2 + p, pages + 1);
  }
  begin_sums(n, x);
  const int ring = c.batch.ring[t.seq], fresh = rows.query[rows.count - 1] + 1;
  for (int first = 0; first < ring; first += TILE)
    add_tile(c, {t.seq, t.head, Part::ring, first, min_int(TILE, ring - first)}, rows, x);
  for (int first = 0; first < fresh; first += TILE)
    add_tile(c, {t.seq, t.head, Part::fresh, first, min_int(TILE, fresh - first)}, rows, x);
  end_sums(n, x, log2 + pages, pages + 1);
}

// a row's sums become shares, added to those of its block; sink: of its query head
static void add_shares(const Call& c, const PageMass& m, int head, int block, int pages, const float* log2, float sink) {
  const int parts = min_int(m.samples, m.blocks[3 * block + 2]);
  const int64_t at = int64_t(block) * c.num_kv_heads + head;
  float top = sink;
  for (int p = 0; p <= pages; p++) top = max_float(top, log2[p]);
  float sum = c.sinks ? exp2f(sink - top) : 0.f;
  for (int p = 0; p <= pages; p++) sum += exp2f(log2[p] - top);
  const float weight = 1.f / (sum * float(parts * heads_per_query(c)));
  for (int p = 0; p < pages; p++) m.mass[at * m.width + p] += weight * exp2f(log2[p] - top);
  const float unread = c.sinks ? exp2f(sink - top) : 0.f;  // sinks are never left out
  m.rest[at] += weight * (exp2f(log2[pages] - top) + unread);
}

static void sample_rows(const Call& c, const PageMass& m, const SampleTask& t, const SampledRows& rows, float* log2,
                        Scratch* x) {
  const int group = heads_per_query(c);
  const int pages = (c.batch.stored[t.seq] + c.layout.page_tokens - 1) / c.layout.page_tokens;
  load_samples(c, t, rows, x->query);
  split_queries(c, rows.count * group, x);
  sum_by_page(c, t, rows, pages, log2, x);
  for (int r = 0; r < rows.count * group; r++) {
    const float sink = c.sinks ? c.sinks[t.head * group + r % group] * LOG2_E : -1e30f;
    add_shares(c, m, t.head, rows.block[r / group], pages, log2 + int64_t(r) * (pages + 1), sink);
  }
}

static void sample_task(const Call& c, const PageMass& m, const SampleTask& t, float* log2, Scratch* x) {
  const int most = MAX_ROWS / heads_per_query(c);
  SampledRows rows = {};
  for (int b = t.block; b < t.block + t.blocks; b++) {
    const int32_t* block = m.blocks + 3 * b;
    const int parts = min_int(m.samples, block[2]);
    for (int i = 0; i < parts; i++) {
      if (rows.count == most) {
        sample_rows(c, m, t, rows, log2, x);
        rows.count = 0;
      }
      rows.query[rows.count] = sampled_query(block, parts, i);
      rows.block[rows.count++] = b;
    }
  }
  if (rows.count) sample_rows(c, m, t, rows, log2, x);
}

// tasks of all blocks into `tasks`, or only their number: no two write to the same block and head
static int split_samples(const Call& c, const PageMass& m, SampleTask* tasks) {
  const int fit = max_int(1, MAX_ROWS / heads_per_query(c) / max_int(1, m.samples));
  const int share = max_int(1, m.count * c.num_kv_heads / (2 * c.num_threads));
  int count = 0;
  for (int b = 0; b < m.count;) {
    const int seq = m.blocks[3 * b];
    int end = b + 1;
    while (end < m.count && m.blocks[3 * end] == seq && end - b < min_int(fit, share)) end++;
    for (int h = 0; h < c.num_kv_heads; h++, count++)
      if (tasks) tasks[count] = {seq, h, b, end - b};
    b = end;
  }
  return count;
}

// false: no memory
static bool page_mass_call(const Call& c, const PageMass& m) {
  const int count = split_samples(c, m, nullptr);
  Array<SampleTask> tasks(count);
  if (!tasks.ok()) return false;
  split_samples(c, m, tasks.data);
  bool failed = false;
#pragma omp parallel num_threads(c.num_threads) if (count > 1) reduction(|| : failed)
  {
    const MatrixRegisters registers;
    Scratch* x = thread_scratch();
    Array<float> log2(MAX_ROWS * (m.width + 1));
    failed = !x || !log2.ok();
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; i++)
      if (x && log2.ok()) sample_task(c, m, tasks[i], log2.data, x);
  }
  return !failed;
}

// As in attend: fresh keys are brought to the form of stored ones first, where that is another.
static bool page_mass(const Call& c, const PageMass& m) {
  if (!c.layout.rotation && !c.key_offset) return page_mass_call(c, m);
  Array<float> key(int64_t(c.batch.query_start[c.batch.num_seqs]) * c.num_kv_heads * c.layout.head_size);
  if (!key.ok()) return false;
  Call entered = c;
  entered.key = enter_fresh(c, c.key, true, key.data);
  entered.fresh_dtype = Dtype::f32;
  return page_mass_call(entered, m);
}
