#include "reports.h"

#include <cstdarg>
#include <cstdio>
#include <map>
#include <tuple>
#include <vector>

#include "module.h"

namespace vlmops::simt {

namespace {

constexpr size_t kMost = 50;  // distinct reports kept per launch

struct Report {
  std::string kind, text, other;
  uint32_t pc, other_pc;
  uint64_t times;
};

std::vector<Report> pending;
std::map<std::tuple<std::string, uint32_t, uint32_t>, size_t> known;
size_t left_out;
std::string finished;

}  // namespace

std::string text(const char* format, ...) {
  char buffer[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  return buffer;
}

void report(const char* kind, const std::string& what, uint32_t pc, const std::string& other, uint32_t other_pc) {
  const auto key = std::make_tuple(std::string(kind), pc, other_pc);
  if (const auto found = known.find(key); found != known.end()) {
    ++pending[found->second].times;
    return;
  }
  if (pending.size() == kMost) {
    ++left_out;
    return;
  }
  known[key] = pending.size();
  pending.push_back({kind, what, other, pc, other_pc, 1});
}

int finish_reports() {
  const int count = static_cast<int>(pending.size());
  if (count == 0) return 0;
  std::vector<uint32_t> pcs;
  for (const Report& r : pending) pcs.insert(pcs.end(), {r.pc, r.other_pc});
  const std::vector<std::string> lines = source_lines(pcs);
  for (size_t i = 0; i < pending.size(); ++i) {
    const Report& r = pending[i];
    finished += r.kind + ": " + r.text;
    if (r.pc != 0) finished += " at " + lines[2 * i];
    if (!r.other.empty()) finished += "; " + r.other;
    if (r.other_pc != 0) finished += " at " + lines[2 * i + 1];
    if (r.times > 1) finished += text(" (%llu times)", static_cast<unsigned long long>(r.times));
    finished += '\n';
  }
  if (left_out > 0) finished += text("and %zu further reports\n", left_out);
  pending.clear();
  known.clear();
  left_out = 0;
  return count;
}

const std::string& reports_text() { return finished; }

void clear_reports() { finished.clear(); }

}  // namespace vlmops::simt
