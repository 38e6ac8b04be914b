// g++ compiles; a "cubin" is the resulting shared object.
#include "sim.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fstream>
#include <sstream>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>
#include <sys/wait.h>

extern const char sim_device_h[]; // device.h, put into the library by build.sh

namespace
{
struct Program
{
    std::string source, name, log, cubin;
    std::vector<std::pair<std::string, std::string>> headers;
};

enum { Success = 0, OutOfMemory = 1, InvalidInput = 3, InvalidProgram = 4, InvalidOption = 5, Compilation = 6 };

void write(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::string read(const std::string& path)
{
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

// The definition in "-DNAME=VALUE" or "--define-macro=NAME=VALUE"; other options of NVRTC have no meaning for g++.
std::string definition(const std::string& option)
{
    for (const char* prefix : {"-D", "--define-macro="})
    {
        if (option.rfind(prefix, 0) == 0)
            return option.substr(strlen(prefix));
    }

    return "";
}
}

extern "C" {
int nvrtcVersion(int* major, int* minor)
{
    *major = 13;
    *minor = 0;
    return Success;
}

const char* nvrtcGetErrorString(int result)
{
    return result == Success ? "NVRTC_SUCCESS" : result == Compilation ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_INVALID_INPUT";
}

int nvrtcCreateProgram(void** program, const char* source, const char* name, int count, const char** headers, const char** names)
{
    Program* p = new Program{source, name ? name : "default_program", "", "", {}};
    for (int i = 0; i < count; i++)
        p->headers.emplace_back(names[i], headers[i]);
    *program = p;
    return Success;
}

int nvrtcDestroyProgram(void** program)
{
    delete (Program*)*program;
    *program = nullptr;
    return Success;
}

int nvrtcCompileProgram(void* program, int count, const char** options)
{
    Program& p = *(Program*)program;
    char folder[] = "/tmp/cuda-sim-XXXXXX";
    if (mkdtemp(folder) == nullptr)
        return OutOfMemory;
    std::string at = std::string(folder) + "/";
    write(at + "device.h", sim_device_h);
    for (const auto& [name, text] : p.headers)
        write(at + name, text);
    write(at + "kernel.cpp", "#include \"device.h\"\n#line 1 \"" + p.name + "\"\n" + p.source);
    std::string defines;
    for (int i = 0; i < count; i++)
    {
        std::string d = definition(options[i]);
        if (!d.empty())
            defines += " '-D" + d + "'";
    }

    // Instrumented when compiled, but linked without the sanitizer's library: the simulator implements the calls (memory.cpp).
    Dl_info self;
    dladdr((void*)&nvrtcVersion, &self);
    std::string here = self.dli_fname;
    here = here.substr(0, here.rfind('/'));
    std::string object = at + "kernel.o", library = at + "kernel.so", log = at + "log";
    std::string command = "g++ -std=c++17 -O1 -fPIC -ffp-contract=off -fno-strict-aliasing -fno-exceptions -fno-rtti -fno-tree-vectorize"
        " -fsanitize=thread,alignment -mfma -I" + at + defines + " -c " + at + "kernel.cpp -o " + object + " > " + log
        + " 2>&1 && g++ -shared -o " + library + " " + object + " -L'" + here + "' -l:libcuda-sim.so >> " + log + " 2>&1";
    int status = system(command.c_str());
    p.log = read(log);
    p.cubin = read(library);
    for (const auto& header : p.headers)
        unlink((at + header.first).c_str());
    for (const char* file : {"device.h", "kernel.cpp", "kernel.o", "kernel.so", "log"})
        unlink((at + file).c_str());
    rmdir(folder);
    return status == 0 && !p.cubin.empty() ? Success : Compilation;
}

int nvrtcGetProgramLogSize(void* program, size_t* bytes)
{
    *bytes = ((Program*)program)->log.size() + 1;
    return Success;
}

int nvrtcGetProgramLog(void* program, char* log)
{
    const std::string& text = ((Program*)program)->log;
    memcpy(log, text.c_str(), text.size() + 1);
    return Success;
}

int nvrtcGetCUBINSize(void* program, size_t* bytes)
{
    *bytes = ((Program*)program)->cubin.size();
    return Success;
}

int nvrtcGetCUBIN(void* program, char* cubin)
{
    const std::string& image = ((Program*)program)->cubin;
    memcpy(cubin, image.data(), image.size());
    return Success;
}
}
