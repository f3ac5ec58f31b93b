#include "npy.h"

#include <cstring>
#include <fstream>
#include <regex>
#include <stdexcept>

namespace mosear::run {
namespace {

constexpr char kMagic[] = "\x93NUMPY";
constexpr size_t kMagicBytes = 6, kAlignment = 64, kMostHeader = 1 << 16;

[[noreturn]] void Refuse(const std::filesystem::path& path, const std::string& why) {
  throw std::runtime_error(path.string() + " " + why);
}

size_t Count(const Array& array) {
  size_t found = 1;
  for (int64_t size : array.shape) found *= static_cast<size_t>(size);
  return found;
}

size_t ItemBytes(const Array& array) { return static_cast<size_t>(array.kind[1] - '0'); }

}  // namespace

Array ReadNpy(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) Refuse(path, "cannot be opened");
  char start[kMagicBytes + 2];
  if (!file.read(start, sizeof start) || std::memcmp(start, kMagic, kMagicBytes) != 0) Refuse(path, "is no .npy file");
  unsigned char length[4] = {};
  file.read(reinterpret_cast<char*>(length), start[kMagicBytes] == 1 ? 2 : 4);
  const size_t bytes = length[0] | size_t{length[1]} << 8 | size_t{length[2]} << 16 | size_t{length[3]} << 24;
  if (!file || bytes > kMostHeader) Refuse(path, "has a header that cannot be read");
  std::string header(bytes, ' ');
  file.read(header.data(), static_cast<std::streamsize>(bytes));
  std::smatch kind, shape;
  if (!std::regex_search(header, kind, std::regex("'descr': *'[<|]([fiub][1248])'")) ||
      header.find("'fortran_order': False") == std::string::npos ||
      !std::regex_search(header, shape, std::regex("'shape': *\\(([0-9, ]*)\\)"))) {
    Refuse(path, "must hold little-endian numbers in C order: " + header);
  }
  Array found;
  found.kind = kind[1];
  const std::string sizes = shape[1];
  const std::regex number("[0-9]+");
  for (auto at = std::sregex_iterator(sizes.begin(), sizes.end(), number); at != std::sregex_iterator(); ++at) {
    found.shape.push_back(std::stoll(at->str()));
  }
  found.bytes.assign(std::istreambuf_iterator<char>(file), {});
  if (found.bytes.size() != Count(found) * ItemBytes(found))
    Refuse(path, "holds fewer or more bytes than its shape says");
  return found;
}

void WriteNpy(const std::filesystem::path& path, const Array& array) {
  std::string header = "{'descr': '<" + array.kind + "', 'fortran_order': False, 'shape': (";
  for (int64_t size : array.shape) header += std::to_string(size) + ", ";
  header += "), }";
  const size_t before = kMagicBytes + 4;
  header.append(kAlignment - (before + header.size() + 1) % kAlignment, ' ');
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  file.write(kMagic, kMagicBytes).write("\x01\x00", 2);
  const char length[] = {static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
  file.write(length, 2).write(header.data(), static_cast<std::streamsize>(header.size()));
  file.write(array.bytes.data(), static_cast<std::streamsize>(array.bytes.size()));
  if (!file.flush()) Refuse(path, "cannot be written");
}

}  // namespace mosear::run
