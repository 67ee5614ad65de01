// The naming rules of buf's STANDARD category, over the descriptors that are compiled in: without them
// generated code reads badly in other languages, and names cannot be changed later.
#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <vector>

#include "google/protobuf/descriptor.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.pb.h"
#include "kvtide/v1/kvtided_config.pb.h"

namespace kvtide {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::FileDescriptor;
using google::protobuf::ServiceDescriptor;

// All files of the API.
std::set<const FileDescriptor*> Files() {
  std::set<const FileDescriptor*> files;
  std::vector<const FileDescriptor*> left = {v1::SessionRequest::descriptor()->file(),
                                             v1::KvtidedConfig::descriptor()->file()};
  while (!left.empty()) {
    const FileDescriptor* file = left.back();
    left.pop_back();
    if (!files.insert(file).second) continue;
    for (int i = 0; i < file->dependency_count(); i++) left.push_back(file->dependency(i));
  }
  return files;
}

bool IsLowerSnake(const std::string& name) {
  return std::all_of(name.begin(), name.end(),
                     [](unsigned char c) { return std::islower(c) || std::isdigit(c) || c == '_'; }) &&
         name.front() != '_' && name.back() != '_' && name.find("__") == std::string::npos;
}

bool IsCamel(const std::string& name) {
  return std::isupper(static_cast<unsigned char>(name.front())) && name.find('_') == std::string::npos;
}

// "KeyCentring" -> "KEY_CENTRING".
std::string UpperSnake(const std::string& camel) {
  std::string out;
  for (const char c : camel) {
    if (std::isupper(static_cast<unsigned char>(c)) && !out.empty()) out += '_';
    out += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return out;
}

void CheckEnum(const EnumDescriptor* type) {
  EXPECT_TRUE(IsCamel(type->name())) << type->full_name();
  const std::string prefix = UpperSnake(type->name()) + "_";
  for (int i = 0; i < type->value_count(); i++) {
    EXPECT_EQ(type->value(i)->name().rfind(prefix, 0), 0u) << type->value(i)->full_name();
  }
  EXPECT_EQ(type->value(0)->name(), prefix + "UNSPECIFIED");
  EXPECT_EQ(type->value(0)->number(), 0);
}

void CheckMessage(const Descriptor* type) {
  EXPECT_TRUE(IsCamel(type->name())) << type->full_name();
  for (int i = 0; i < type->field_count(); i++) {
    EXPECT_TRUE(IsLowerSnake(type->field(i)->name())) << type->field(i)->full_name();
  }
  for (int i = 0; i < type->nested_type_count(); i++) CheckMessage(type->nested_type(i));
  for (int i = 0; i < type->enum_type_count(); i++) CheckEnum(type->enum_type(i));
}

TEST(Naming, FilesMessagesAndEnums) {
  EXPECT_EQ(Files().size(), 10u);
  for (const FileDescriptor* file : Files()) {
    EXPECT_EQ(file->package(), "kvtide.v1");
    EXPECT_EQ(file->name().rfind("kvtide/v1/", 0), 0u) << file->name();
    for (int i = 0; i < file->message_type_count(); i++) CheckMessage(file->message_type(i));
    for (int i = 0; i < file->enum_type_count(); i++) CheckEnum(file->enum_type(i));
  }
}

TEST(Naming, EveryMethodHasARequestAndAResponseOfItsOwn) {
  const ServiceDescriptor* service = v1::SessionRequest::descriptor()->file()->service(0);
  EXPECT_EQ(service->name(), "KvCacheService");
  for (int i = 0; i < service->method_count(); i++) {
    const auto* method = service->method(i);
    EXPECT_EQ(method->input_type()->name(), method->name() + "Request");
    EXPECT_EQ(method->output_type()->name(), method->name() + "Response");
  }
}

TEST(Naming, TheSessionCarriesEveryMethod) {
  const ServiceDescriptor* service = v1::SessionRequest::descriptor()->file()->service(0);
  const auto* calls = v1::SessionRequest::descriptor()->oneof_decl(0);
  const auto* results = v1::SessionResponse::descriptor()->oneof_decl(0);
  std::set<std::string> requests, responses;
  for (int i = 0; i < calls->field_count(); i++) requests.insert(calls->field(i)->message_type()->name());
  for (int i = 0; i < results->field_count(); i++)
    responses.insert(results->field(i)->message_type()->name());
  for (int i = 0; i < service->method_count(); i++) {
    const auto* method = service->method(i);
    if (method->client_streaming()) continue;
    EXPECT_EQ(requests.count(method->input_type()->name()), 1u) << method->name();
    EXPECT_EQ(responses.count(method->output_type()->name()), 1u) << method->name();
  }
}

}  // namespace
}  // namespace kvtide
