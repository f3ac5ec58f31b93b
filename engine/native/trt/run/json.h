// As much of JSON as a manifest holds: read whole, looked at by name.
#ifndef MOSEAR_TRT_RUN_JSON_H_
#define MOSEAR_TRT_RUN_JSON_H_

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace mosear::run {

struct Json {
  enum class Kind { kNull, kBool, kNumber, kText, kList, kObject };
  Kind kind = Kind::kNull;
  double number = 0;  // of a truth value too
  std::string text;
  std::vector<Json> list;
  std::map<std::string, Json> object;

  // The member of that name, or null.
  const Json& operator[](const std::string& name) const {
    static const Json nothing;
    const auto found = object.find(name);
    return found == object.end() ? nothing : found->second;
  }
};

// Throws std::runtime_error naming the place where the text is no JSON.
Json ParseJson(const std::string& text);

}  // namespace mosear::run

#endif  // MOSEAR_TRT_RUN_JSON_H_
