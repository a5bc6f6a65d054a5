// Probability mass per KV head and token: a second pass over the keys once the softmax
// denominators are known, so that no matrix of probabilities ever exists.
#pragma once

#include "step/task.h"

// the first of a sequence's queries whose mass is asked for, `first` [num_seqs]; returns their number
static int64_t counted_queries(const Call& c, int64_t* first) {
  const Batch& b = c.batch;
  int64_t queries = 0;
  for (int s = 0; s < b.num_seqs; s++) {
    first[s] = queries;
    if (c.mass.place[s] >= 0) queries += max_int(0, b.query_start[s + 1] - b.query_start[s] - c.mass.first_query[s]);
  }
  return queries;
}

enum class Part : int { store, ring, fresh };
struct MassTask {
  int seq, head;
  Part part;
  int first, count;  // tokens of the part
};

static void load_floats(const Call& c, const MassTask& t, Tile* tile) {
  const Layout& l = c.layout;
  KvRows rows;
  if (t.part == Part::store) {
    const uint8_t* run = c.store_run(t.seq, t.first / l.page_tokens, t.head);
    const int slot = t.first % l.page_tokens;
    if (l.kind == Kind::affine) return tile_keys_from_codes(l, run, slot, t.count, tile);
    page_rows(c, run, slot, t.count, &rows);
  } else if (t.part == Part::ring) {
    ring_rows(c, t.seq, t.head, t.first, t.count, &rows);
  } else {
    fresh_rows(c, t.seq, t.head, t.first, t.count, &rows);
  }
  tile_keys_from_rows(rows, l.head_size, tile);
}

// keys of a tile, and query rows of a block, for score_tile
static void load_keys(const Call& c, const MassTask& t, Scratch* x) {
  load_floats(c, t, &x->tile);
  if (splits_floats(c)) keys_to_bf16(x->tile, c.layout.head_size, t.count, 2, &x->bf16);
}
static void split_queries(const Call& c, int rows, Scratch* x) {
  if (splits_floats(c)) queries_to_bf16(x->query, rows, c.layout.head_size, &x->bf16);
}

// adds 2^(score - log2 denominator) of the visible tokens
static void add_row(float* score, int visible, float log2_sum, float* mass) {
  const int whole = visible / FW * FW;
  for (int t = 0; t < whole; t += FW)
    Wide::store(mass + t, Wide::load(mass + t) + fw_exp2(Wide::load(score + t) - Wide::set(log2_sum)));
  for (int t = whole; t < visible; t++) mass[t] += exp2f(score[t] - log2_sum);
}

static void mass_task(const Call& c, const MassTask& t, const Denominators& z, Scratch* x) {
  const int group = heads_per_query(c), block = max_int(1, MAX_ROWS / group);
  const int fresh = c.batch.query_start[t.seq + 1] - c.batch.query_start[t.seq];
  const int first = max_int(0, c.mass.first_query[t.seq]);
  alignas(64) float mass[TILE] = {0};
  load_keys(c, t, x);
  for (int q = first, next; q < fresh; q = next) {
    const int queries = min_int(min_int(block, fresh - q), c.same_reads(q));
    next = q + queries;
    if (t.part == Part::store && !c.reads_page(t.seq, t.head, q, t.first / c.layout.page_tokens)) continue;
    const int causal_from = t.part == Part::fresh ? q - t.first : int(SEES_ALL);
    if (causal_from + queries <= 0) continue;
    load_queries(c, Task{t.seq, t.head, q, queries, 0, 0, false, -1}, x->query);
    split_queries(c, queries * group, x);
    score_tile(c, t.count, queries * group, x);
    for (int r = 0; r < queries * group; r++) {
      const int visible = min_int(t.count, causal_from + r / group + 1);
      const int64_t row = (z.offset[t.seq] + q - first + r / group) * c.num_heads + t.head * group + r % group;
      if (visible <= 0) continue;
      if (c.soft_cap > 0.f) soft_cap_row(x->score + r * TILE, visible, c.soft_cap * LOG2_E);
      add_row(x->score + r * TILE, visible, z.log2[row], mass);
    }
  }
  const int before = t.part == Part::store ? 0 : c.batch.stored[t.seq] + (t.part == Part::fresh ? c.batch.ring[t.seq] : 0);
  float* out = c.mass.out + t.head * c.mass.stride + c.mass.place[t.seq] + before + t.first;
  for (int i = 0; i < t.count; i++) out[i] += mass[i];
}

// tiles of a sequence and head into `tasks`, or only their number
static int mass_tiles(const Call& c, int seq, int head, MassTask* tasks) {
  const Batch& b = c.batch;
  int count = 0;
  const bool all = c.reads.block > 0;  // queries read unlike pages; mass_task leaves some out
  const int pages = all ? (b.stored[seq] + c.layout.page_tokens - 1) / c.layout.page_tokens : c.store_pages(seq, head, 0);
  for (int i = 0; i < pages; i++) {
    const int from = (all ? i : c.store_page(seq, head, 0, i)) * c.layout.page_tokens;
    const int end = min_int(from + c.layout.page_tokens, b.stored[seq]);
    const bool counts = from + c.layout.page_tokens > c.mass.first_token[seq];
    for (int t = from; counts && t < end; t += TILE, count++)
      if (tasks) tasks[count] = {seq, head, Part::store, t, min_int(TILE, end - t)};
  }
  const int lengths[2] = {b.ring[seq], b.query_start[seq + 1] - b.query_start[seq]};
  for (int part = 0; part < 2; part++)
    for (int t = 0; t < lengths[part]; t += TILE, count++)
      if (tasks) tasks[count] = {seq, head, part ? Part::fresh : Part::ring, t, min_int(TILE, lengths[part] - t)};
  return count;
}

// tiles of all sequences into `tasks`, or only their number
static int all_mass_tiles(const Call& c, MassTask* tasks) {
  int count = 0;
  for (int s = 0; s < c.batch.num_seqs; s++)
    for (int h = 0; h < c.num_kv_heads && c.mass.place[s] >= 0; h++)
      count += mass_tiles(c, s, h, tasks ? tasks + count : nullptr);
  return count;
}

// false: no memory
static bool count_mass(const Call& c, const Denominators& z) {
  const int count = all_mass_tiles(c, nullptr);
  Array<MassTask> tasks(count);
  if (!tasks.ok()) return false;
  all_mass_tiles(c, tasks.data);
  bool failed = false;
#pragma omp parallel num_threads(c.num_threads) if (count > 1) reduction(|| : failed)
  {
    const MatrixRegisters registers;
    Scratch* x = thread_scratch();
    failed = !x;
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < count; i++)
      if (x) mass_task(c, tasks[i], z, x);
  }
  return !failed;
}
