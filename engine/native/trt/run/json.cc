#include "json.h"

#include <cctype>
#include <cstdlib>
#include <cstring>

namespace mosear::run {
namespace {

constexpr int kDeepest = 100;

class Parser {
 public:
  explicit Parser(const std::string& text) : text_(text) {}

  Json Whole() {
    Json found = Value(0);
    Space();
    if (at_ != text_.size()) Fail();
    return found;
  }

 private:
  [[noreturn]] void Fail() const { throw std::runtime_error("no JSON at byte " + std::to_string(at_)); }

  void Space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_]) != nullptr) ++at_;
  }

  bool Take(char wanted) {
    Space();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  Json Word(const char* word, Json::Kind kind, double number) {
    if (text_.compare(at_, std::strlen(word), word) != 0) Fail();
    at_ += std::strlen(word);
    Json found;
    found.kind = kind;
    found.number = number;
    return found;
  }

  Json Value(int depth) {
    Space();
    if (at_ >= text_.size() || depth > kDeepest) Fail();
    switch (text_[at_]) {
      case '{':
        return Object(depth);
      case '[':
        return List(depth);
      case '"': {
        Json found;
        found.kind = Json::Kind::kText;
        found.text = Text();
        return found;
      }
      case 't':
        return Word("true", Json::Kind::kBool, 1);
      case 'f':
        return Word("false", Json::Kind::kBool, 0);
      case 'n':
        return Word("null", Json::Kind::kNull, 0);
      default:
        return Number();
    }
  }

  Json Number() {
    const char* start = text_.c_str() + at_;
    char* end = nullptr;
    Json found;
    found.kind = Json::Kind::kNumber;
    found.number = std::strtod(start, &end);
    if (end == start || (std::isdigit(static_cast<unsigned char>(*start)) == 0 && *start != '-')) Fail();
    at_ += static_cast<size_t>(end - start);
    return found;
  }

  std::string Text() {
    if (!Take('"')) Fail();
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      if (text_[at_] != '\\') {
        found += text_[at_++];
        continue;
      }
      if (at_ + 1 >= text_.size()) Fail();
      const char escaped = text_[at_ + 1];
      at_ += 2;
      if (escaped == 'u') {  // names of files are ASCII; any other letter only has to be passed
        if (at_ + 4 > text_.size()) Fail();
        const long code = std::strtol(text_.substr(at_, 4).c_str(), nullptr, 16);
        found += code < 128 ? static_cast<char>(code) : '?';
        at_ += 4;
      } else {
        const char* place = std::strchr("n\nt\tr\rb\bf\f", escaped);
        found += place == nullptr ? escaped : place[1];
      }
    }
    if (at_ >= text_.size()) Fail();
    ++at_;
    return found;
  }

  Json Object(int depth) {
    Json found;
    found.kind = Json::Kind::kObject;
    Take('{');
    if (Take('}')) return found;
    do {
      Space();
      const std::string name = Text();
      if (!Take(':')) Fail();
      found.object[name] = Value(depth + 1);
    } while (Take(','));
    if (!Take('}')) Fail();
    return found;
  }

  Json List(int depth) {
    Json found;
    found.kind = Json::Kind::kList;
    Take('[');
    if (Take(']')) return found;
    do {
      found.list.push_back(Value(depth + 1));
    } while (Take(','));
    if (!Take(']')) Fail();
    return found;
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace

Json ParseJson(const std::string& text) { return Parser(text).Whole(); }

}  // namespace mosear::run
