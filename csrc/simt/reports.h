// Bugs found in a kernel, as text.
#pragma once

#include <cstdint>
#include <string>

namespace vlmops::simt {

// Kinds are words a test can look for: race, uninitialised, out-of-bounds, misaligned, divergence, deadlock, async,
// ldmatrix, shared-size, hang, launch.
// One report per (kind, place, other place); later ones are counted. `pc`s are offsets in the kernel's library.
void report(const char* kind, const std::string& text, uint32_t pc = 0, const std::string& other = "",
            uint32_t other_pc = 0);

// Adds source lines to the reports of the launch that ended. Returns how many distinct reports it made.
int finish_reports();

const std::string& reports_text();
void clear_reports();

// printf into a string.
__attribute__((format(printf, 1, 2))) std::string text(const char* format, ...);

}  // namespace vlmops::simt
