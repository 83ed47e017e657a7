// The kernel's shared library: its __shared__ variables, its constants, its source lines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace vlmops::simt {

struct StaticShared {
  std::string name;
  char* begin;
  size_t bytes;
};

struct Module {
  std::string path;
  uintptr_t base = 0;
  bool hooked = false;                                     // compiled with -fsanitize=thread
  std::vector<StaticShared> shared;                        // by address
  std::vector<std::pair<uintptr_t, uintptr_t>> constants;  // mapped, never written
};

// The library `function` lies in becomes the module of the launch. False: it is not a kernel unit.
bool load_module(const void* function);
const Module& module();

inline bool is_constant(const Module& m, uintptr_t p) {
  for (const auto& [begin, end] : m.constants)
    if (p >= begin && p < end) return true;
  return false;
}

// "file:line" (of the outermost inlined function last) per offset in the module; "0x..." where it is not known.
std::vector<std::string> source_lines(const std::vector<uint32_t>& offsets);

}  // namespace vlmops::simt
