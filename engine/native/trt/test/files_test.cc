// What the runner reads, for a test to look at: files_test sha FILE | npy IN OUT | json FILE.
#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "../run/json.h"
#include "../run/npy.h"
#include "../run/sha256.h"

int main(int count, char** words) try {
  if (count < 3) return 2;
  const std::string what = words[1];
  std::ifstream file(words[2], std::ios::binary);
  if (what == "sha") {
    std::puts(mosear::run::Sha256(file).c_str());
  } else if (what == "npy" && count == 4) {
    mosear::run::WriteNpy(words[3], mosear::run::ReadNpy(words[2]));
  } else if (what == "json") {
    std::stringstream text;
    text << file.rdbuf();
    const mosear::run::Json found = mosear::run::ParseJson(text.str());
    std::printf("%s|%g|%zu|%s\n", found["a"]["b"].text.c_str(), found["n"].number, found["list"].list.size(),
                found["gone"]["x"].text.c_str());
  }
  return 0;
} catch (const std::runtime_error& error) {
  std::puts(error.what());
  return 1;
}
