#include "module.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>

#include "reports.h"

namespace vlmops::simt {

namespace {

Module loaded;

std::string demangled_variable(const char* symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string result = status == 0 ? name : symbol;
  std::free(name);
  const size_t colons = result.rfind("::");  // kernel(int)::tile -> tile
  return colons == std::string::npos ? result : result.substr(colons + 2);
}

// __shared__ variables are the static variables of functions in writable sections: _ZZ<function>E<name>.
void read_symbols(const std::vector<char>& file) {
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(file.data());
  if (file.size() < sizeof *header || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0) return;
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(file.data() + header->e_shoff);
  const char* section_names = file.data() + sections[header->e_shstrndx].sh_offset;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(file.data() + sections[s].sh_offset);
    const char* names = file.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(Elf64_Sym); ++i) {
      const Elf64_Sym& symbol = symbols[i];
      const char* name = names + symbol.st_name;
      if (ELF64_ST_TYPE(symbol.st_info) != STT_OBJECT || symbol.st_size == 0 || symbol.st_shndx >= header->e_shnum)
        continue;
      const Elf64_Shdr& section = sections[symbol.st_shndx];
      if ((section.sh_flags & SHF_WRITE) == 0 || std::strncmp(name, "_ZZ", 3) != 0) continue;
      if (std::strncmp(section_names + section.sh_name, ".data.rel.ro", 12) == 0) continue;
      loaded.shared.push_back(
          {demangled_variable(name), reinterpret_cast<char*>(loaded.base + symbol.st_value), symbol.st_size});
    }
  }
  std::sort(loaded.shared.begin(), loaded.shared.end(),
            [](const StaticShared& a, const StaticShared& b) { return a.begin < b.begin; });
}

int find_constants(dl_phdr_info* info, size_t, void*) {
  if (info->dlpi_addr != loaded.base) return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    const bool constant =
        (segment.p_type == PT_LOAD && (segment.p_flags & PF_W) == 0) || segment.p_type == PT_GNU_RELRO;
    if (constant) {
      const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      loaded.constants.emplace_back(begin, begin + segment.p_memsz);
    }
  }
  return 1;
}

}  // namespace

bool load_module(const void* function) {
  Dl_info info{};
  if (dladdr(function, &info) == 0 || info.dli_fname == nullptr) return false;
  loaded = Module{};
  loaded.path = info.dli_fname;
  loaded.base = reinterpret_cast<uintptr_t>(info.dli_fbase);
  void* handle = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  const auto* hooked = static_cast<const int*>(dlsym(handle, "vlmops_simt_hooked"));
  dlclose(handle);
  if (hooked == nullptr) return false;
  loaded.hooked = *hooked != 0;
  std::ifstream stream(loaded.path, std::ios::binary);
  read_symbols(std::vector<char>(std::istreambuf_iterator<char>(stream), {}));
  dl_iterate_phdr(find_constants, nullptr);
  return true;
}

const Module& module() { return loaded; }

std::vector<std::string> source_lines(const std::vector<uint32_t>& offsets) {
  std::vector<std::string> lines;
  std::string command = "LD_PRELOAD= addr2line -a -i -e '";
  for (const char c : loaded.path) command += c == '\'' ? std::string("'\\''") : std::string(1, c);
  command += "'";
  for (const uint32_t offset : offsets) {
    // the byte before a return address belongs to the call
    command += text(" 0x%x", offset == 0 ? 0 : offset - 1);
    lines.push_back(text("offset 0x%x", offset));
  }
  FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
  if (pipe == nullptr) return lines;
  // -a prints the address on a line of its own, then a line per inlined function, innermost first.
  char buffer[1024];
  size_t next = 0;
  bool first = true;
  while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) {
    std::string line(buffer, std::strcspn(buffer, "\n"));
    if (line.rfind("0x", 0) == 0) {
      ++next;
      first = true;
      continue;
    }
    if (next == 0 || next > lines.size() || line.find("??") != std::string::npos) continue;
    if (const size_t discriminator = line.find(" (disc"); discriminator != std::string::npos)
      line.resize(discriminator);
    if (line.size() > 2 && line.substr(line.size() - 2) == ":0") continue;  // no line of its own
    line = line.substr(line.rfind('/') + 1);
    // the kernel's line is what one looks for; of headers' lines the outermost call is kept before it
    if (first) lines[next - 1] = line;
    else lines[next - 1] += " < " + line;
    first = false;
  }
  pclose(pipe);
  return lines;
}

}  // namespace vlmops::simt
