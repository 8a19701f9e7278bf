#include "nn/replace_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <c10/util/Exception.h>
#include <fmt/format.h>

namespace quantrain::nn::detail {
namespace {

namespace fs = std::filesystem;

constexpr int kAttempts =
    1000;  // at a name that is free: each failure is another writer's name, or a clean-up in between

// A descriptor that closes itself.
class File {
 public:
  File(const std::string& path, int flags, mode_t mode = 0)
      : descriptor_(::open(path.c_str(), flags | O_CLOEXEC, mode)) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() { close(); }

  int get() const { return descriptor_; }
  explicit operator bool() const { return descriptor_ >= 0; }

  bool close() {
    const bool good = descriptor_ < 0 || ::close(descriptor_) == 0;
    descriptor_ = -1;
    return good;
  }

 private:
  int descriptor_;
};

fs::path folder_of(const std::string& path) {
  const fs::path folder = fs::path(path).parent_path();
  return folder.empty() ? fs::path(".") : folder;
}

// What is to be replaced: the file, not a link to it, also where it is not there yet.
std::string behind_links(const std::string& path) {
  constexpr int kMost = 40;  // as Linux follows
  fs::path target = path;
  for (int i = 0; i < kMost && fs::is_symlink(target); ++i) {
    const fs::path next = fs::read_symlink(target);
    target = next.is_absolute() ? next : target.parent_path() / next;
  }
  return target.string();
}

// Temporaries of `path` are ".NAME.PROCESS-NUMBER.tmp".
std::string temporary_prefix(const std::string& path) {
  return fmt::format(".{}.", fs::path(path).filename().string());
}

constexpr std::string_view kSuffix = ".tmp";

// A writer holds a lock on its temporary; the system drops it where the process ends.
void remove_stale(const std::string& path) {
  const std::string prefix = temporary_prefix(path);
  std::error_code ignored;
  for (fs::directory_iterator item(folder_of(path), ignored), end; !ignored && item != end; item.increment(ignored)) {
    const std::string name = item->path().filename().string();
    if (name.size() <= prefix.size() + kSuffix.size() || name.compare(0, prefix.size(), prefix) != 0 ||
        name.compare(name.size() - kSuffix.size(), kSuffix.size(), kSuffix) != 0)
      continue;
    const File file(item->path().string(), O_RDONLY);
    if (file && ::flock(file.get(), LOCK_EX | LOCK_NB) == 0) ::unlink(item->path().c_str());
  }
}

// True where the locked file still has its name: a clean-up may have come between creation and lock.
bool is_linked(int descriptor) {
  struct stat status{};
  return ::fstat(descriptor, &status) == 0 && status.st_nlink > 0;
}

// False with errno set.
bool write_all(int descriptor, std::string_view bytes) {
  constexpr size_t kMost = size_t{1} << 30;  // of one call: Linux writes no more than 2 GB
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor, bytes.data(), std::min(bytes.size(), kMost));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return true;
}

// An existing file keeps its permissions; a new one gets those that the umask leaves of 0666.
void copy_mode(const std::string& path, int descriptor) {
  struct stat status{};
  if (::stat(path.c_str(), &status) == 0) static_cast<void>(::fchmod(descriptor, status.st_mode & 07777));
}

}  // namespace

void replace_file(const std::string& path, const std::vector<std::string_view>& pieces) {
  static std::atomic<uint64_t> number{0};
  const std::string target = behind_links(path);
  TORCH_CHECK(!fs::is_directory(target), path, ": expected a file that can be written, got a folder");
  remove_stale(target);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const std::string name = fmt::format("{}{}-{}{}", temporary_prefix(target), ::getpid(), number++, kSuffix);
    const std::string temporary = (folder_of(target) / name).string();
    File file(temporary, O_WRONLY | O_CREAT | O_EXCL, 0666);
    if (!file && errno == EEXIST) continue;  // of another container with the same process number
    TORCH_CHECK(file, path, ": expected a file that can be written, got ", std::strerror(errno));
    if (::flock(file.get(), LOCK_EX) != 0 || !is_linked(file.get())) {
      ::unlink(temporary.c_str());
      continue;
    }
    copy_mode(target, file.get());
    bool good = true;
    for (const std::string_view piece : pieces) good = good && write_all(file.get(), piece);
    good = good && ::fsync(file.get()) == 0 && ::rename(temporary.c_str(), target.c_str()) == 0;
    if (!good) {
      const std::string reason = std::strerror(errno);
      ::unlink(temporary.c_str());
      TORCH_CHECK(false, path, ": expected a file that can be written, got ", reason);
    }
    file.close();
    const File folder(folder_of(target).string(), O_RDONLY | O_DIRECTORY);
    if (folder) static_cast<void>(::fsync(folder.get()));  // some file systems cannot; the rename is done
    return;
  }
  TORCH_CHECK(false, path, ": expected a free name for a temporary file beside it, got none in ", kAttempts);
}

}  // namespace quantrain::nn::detail
