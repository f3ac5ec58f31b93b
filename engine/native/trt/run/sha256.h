// SHA-256 (FIPS 180-4) of a file.
#ifndef MOSEAR_TRT_RUN_SHA256_H_
#define MOSEAR_TRT_RUN_SHA256_H_

#include <istream>
#include <string>

namespace mosear::run {

// Hexadecimal digest of all that a stream still holds.
std::string Sha256(std::istream& stream);

}  // namespace mosear::run

#endif  // MOSEAR_TRT_RUN_SHA256_H_
