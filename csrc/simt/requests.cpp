#include "requests.h"

#include <algorithm>
#include <vector>

#include "memory.h"

namespace vlmops::simt {

namespace {

constexpr int kNone = -1;
constexpr int kLookAhead = 256;
constexpr size_t kMostNodes = size_t{1} << 16;  // of a pass; accesses beyond count as requests of one lane

struct Node {
  Request request;
  uint32_t pc;
  Path path;
  int next;
};

// A linked list in program order. A lane's accesses are matched from where its last one was found; what no earlier lane
// did is inserted there. So lanes that skip a branch or end a loop early still fall into step.
std::vector<Node> nodes;
int head = kNone;
int cursor = kNone;
int cursor_lane = kNone;

int insert(int after, uint32_t pc, Path path) {
  const int fresh = static_cast<int>(nodes.size());
  nodes.emplace_back();
  Node& node = nodes.back();
  node.pc = pc;
  node.path = path;
  int& link = after == kNone ? head : nodes[after].next;
  node.next = link;
  link = fresh;
  return fresh;
}

// Sectors (32 bytes) the request touches, and the fewest its distinct bytes fit into.
void sectors(const Request& request, uint64_t& touched, uint64_t& least) {
  uintptr_t sorted[32];
  int n = 0;
  bool ascending = true;
  for (int l = 0; l < 32; ++l) {
    if ((request.mask >> l & 1) == 0) continue;
    ascending = ascending && (n == 0 || request.address[l] >= sorted[n - 1]);
    sorted[n++] = request.address[l];
  }
  if (!ascending) std::sort(sorted, sorted + n);
  touched = 0;
  uint64_t distinct = 0;
  uintptr_t last_sector = ~uintptr_t{0}, covered = 0;
  for (int i = 0; i < n; ++i) {
    const uintptr_t begin = sorted[i], end = begin + request.bytes;
    uintptr_t first = begin >> 5;
    if (first == last_sector) ++first;
    const uintptr_t last = (end - 1) >> 5;
    if (last >= first) touched += last - first + 1;
    last_sector = last;
    const uintptr_t from = std::max(begin, covered);
    if (end > from) distinct += end - from;
    covered = std::max(covered, end);
  }
  least = (distinct + 31) / 32;
}

// 32 banks of 4 bytes: as many wavefronts as the busiest bank has distinct words, per group of lanes that a wavefront
// can serve at this width (32 lanes of up to 4 bytes, 16 of 8, 8 of 16).
void wavefronts(const Request& request, uint64_t& needed, uint64_t& least) {
  const int group = request.bytes > 8 ? 8 : request.bytes > 4 ? 16 : 32;
  needed = least = 0;
  for (int begin = 0; begin < 32; begin += group) {
    uintptr_t words[32 * 4];
    int n = 0;
    for (int l = begin; l < begin + group; ++l) {
      if ((request.mask >> l & 1) == 0) continue;
      const uintptr_t first = request.address[l] >> 2, last = (request.address[l] + request.bytes - 1) >> 2;
      for (uintptr_t w = first; w <= last && n < 128; ++w) words[n++] = w;
    }
    if (n == 0) continue;
    std::sort(words, words + n);
    n = static_cast<int>(std::unique(words, words + n) - words);
    unsigned busy[32] = {}, most = 0;
    for (int i = 0; i < n; ++i) most = std::max(most, ++busy[words[i] % 32]);
    needed += most;
    least += static_cast<uint64_t>((n + 31) / 32);
  }
}

void count(const Node& node) {
  const Request& request = node.request;
  const auto bytes = static_cast<uint64_t>(__builtin_popcount(request.mask)) * request.bytes;
  if (node.path == Path::kShared) {
    count_shared(request, true);
    return;
  }
  uint64_t touched = 0, least = 0;
  sectors(request, touched, least);
  if (node.path == Path::kGlobalLoad) {
    ++counters.global_load_requests;
    counters.global_load_sectors += touched;
    counters.global_load_sectors_least += least;
    counters.global_load_bytes += bytes;
  } else {
    ++counters.global_store_requests;
    counters.global_store_sectors += touched;
    counters.global_store_sectors_least += least;
    counters.global_store_bytes += bytes;
  }
}

}  // namespace

void note(int lane, uint32_t pc, uintptr_t p, uint32_t bytes, Path path) {
  if (lane != cursor_lane) {
    cursor_lane = lane;
    cursor = kNone;
  }
  const auto matches = [&](const Node& n) { return n.pc == pc && n.path == path && n.request.bytes == bytes; };
  int candidate = cursor == kNone ? head : nodes[cursor].next;
  for (int step = 0; candidate != kNone && !matches(nodes[candidate]); ++step)
    candidate = step < kLookAhead ? nodes[candidate].next : kNone;
  if (candidate == kNone && nodes.size() == kMostNodes) {
    Node alone{};
    alone.path = path;
    alone.request.add(lane, p, bytes);
    count(alone);
    return;
  }
  if (candidate == kNone) candidate = insert(cursor, pc, path);
  nodes[candidate].request.add(lane, p, bytes);
  cursor = candidate;
}

void count_shared(const Request& request, bool first) {
  uint64_t needed = 0, least = 0;
  wavefronts(request, needed, least);
  if (first) ++counters.shared_requests;
  counters.shared_wavefronts += needed;
  counters.shared_wavefronts_least += least;
  counters.shared_bytes += static_cast<uint64_t>(__builtin_popcount(request.mask)) * request.bytes;
}

void flush_requests() {
  for (const Node& node : nodes) count(node);
  nodes.clear();
  head = cursor = cursor_lane = kNone;
}

}  // namespace vlmops::simt
