using System.Globalization;
using System.Reflection;
using System.Runtime.CompilerServices;
using System.Runtime.InteropServices;
using System.Text;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// A C++ program, generated from the bindings and compiled against NVIDIA's headers, that prints what the headers say of each binding; and
/// the differences.
/// </summary>
internal sealed class HeaderProgram
{
    // With its first line cuda.h declares every version of a function by the name that the library exports: cuMemAlloc_v2, and cuMemAlloc,
    // which came before it.
    private const string Start = """
        #define __CUDA_API_VERSION_INTERNAL
        #include <cuda.h>
        #include <nvrtc.h>
        #include <cublasLt.h>
        #include <nccl.h>
        #include <cstddef>
        #include <cstdio>
        #include <tuple>
        #include <type_traits>

        template <class T> constexpr size_t size_of() { if constexpr (std::is_void_v<T>) return 0; else return sizeof(T); }

        template <class T> constexpr const char* kind()
        {
            return std::is_void_v<T> ? "void" : std::is_pointer_v<T> ? "pointer" : std::is_enum_v<T> ? "enum"
                : std::is_floating_point_v<T> ? "float" : std::is_class_v<T> || std::is_union_v<T> ? "struct"
                : std::is_signed_v<T> ? "signed" : "unsigned";
        }

        // The type that a pointer points to, where the header has one.
        template <class T, class = void> struct Pointee { static constexpr size_t size = 0; };
        template <class T> struct Pointee<T*, std::enable_if_t<!std::is_void_v<T> && sizeof(T) != 0>>
        {
            static constexpr size_t size = sizeof(T);
        };

        template <class T> void value(const char* function, int place)
        {
            std::printf("%s %d\t%s %zu %zu\n", function, place, kind<T>(), size_of<T>(), Pointee<T>::size);
        }

        template <class F> struct Signature;
        template <class R, class... P> struct Signature<R (*)(P...)>
        {
            // Place 0 is the return type; a missing place is void.
            template <int Place> static auto at()
            {
                if constexpr (Place <= (int)sizeof...(P))
                    return std::tuple<std::tuple_element_t<Place, std::tuple<R, P...>>*>{};
                else
                    return std::tuple<std::nullptr_t*>{};
            }

            static void print(const char* name)
            {
                std::printf("%s parameters\t%zu\n", name, sizeof...(P));
                int place = 0;
                value<R>(name, place);
                (value<P>(name, ++place), ...);
            }
        };

        template <class F, int Place>
        using Part = std::remove_pointer_t<std::tuple_element_t<0, decltype(Signature<F>::template at<Place>())>>;
        template <class T> using Bare = std::remove_cv_t<std::remove_pointer_t<T>>;

        int main()
        {

        """;

    private readonly Dictionary<string, string> _says;

    private HeaderProgram(Dictionary<string, string> says) => _says = says;

    /// <summary>Compiles and runs it.</summary>
    /// <param name="includes">Folders of the headers, in order of precedence.</param>
    public static async Task<HeaderProgram> Run(params string[] includes)
    {
        string folder = Directory.CreateTempSubdirectory("rollout-headers-").FullName;
        try
        {
            string source = Path.Combine(folder, "headers.cpp"), program = Path.Combine(folder, "headers");
            await File.WriteAllTextAsync(source, Source());
            string[] folders = [.. includes.SelectMany(include => new[] { "-isystem", include })];
            await ProgramOutput.Of("g++", ["-std=c++17", "-w", .. folders, "-o", program, source]);
            string[] lines = (await ProgramOutput.Of(program)).Split('\n', StringSplitOptions.RemoveEmptyEntries);
            return new HeaderProgram(lines.Select(line => line.Split('\t')).ToDictionary(line => line[0], line => line[1]));
        }
        finally
        {
            Directory.Delete(folder, recursive: true);
        }
    }

    /// <summary>A line for every difference between the bindings and the headers.</summary>
    public IEnumerable<string> Differences() => [.. OfNumbers(), .. OfStructs(), .. OfFunctions()];

    private static string Source()
    {
        StringBuilder source = new(Start);
        foreach (FieldInfo field in Numbers())
            Print(field.Name, Bindings.HeaderName(field));
        foreach (Type type in Bindings.Structs)
        {
            string name = Bindings.HeaderName(type);
            Print(type.Name, $"sizeof({name})");
            foreach (FieldInfo field in Fields(type))
            {
                string member = Bindings.HeaderName(field);
                Print($"{type.Name}.{field.Name} offset", $"offsetof({name}, {member})");
                Print($"{type.Name}.{field.Name} size", $"sizeof((({name}*)nullptr)->{member})");
            }
        }

        foreach ((MethodInfo method, _) in Bindings.Functions)
        {
            string name = Symbol(method), function = $"decltype(&{name})";
            source.AppendLine(CultureInfo.InvariantCulture, $"    Signature<{function}>::print(\"{name}\");");
            foreach ((int place, Type type) in Places(method).Where(part => Named(part.Type) is not null))
                Print($"{name} {place} named", $"std::is_same_v<Bare<Part<{function}, {place}>>, {Bindings.HeaderName(Named(type)!)}>");
        }

        return source.AppendLine("}").ToString();

        void Print(string key, string value) =>
            source.AppendLine(CultureInfo.InvariantCulture, $"    std::printf(\"{key}\\t%lld\\n\", (long long)({value}));");
    }

    private IEnumerable<string> OfNumbers() =>
        from field in Numbers()
        let bound = Convert.ToInt64(field.GetRawConstantValue(), CultureInfo.InvariantCulture)
        where _says[field.Name] != $"{bound}"
        select $"{field.Name} is {bound}, the header says {_says[field.Name]}";

    private IEnumerable<string> OfStructs()
    {
        foreach (Type type in Bindings.Structs)
        {
            int size = SizeOf(type), says = int.Parse(_says[type.Name], CultureInfo.InvariantCulture);
            if (Bindings.MayBeShorter(type) ? size > says : size != says)
                yield return $"{type.Name} has {size} bytes, the header says {says}";
            foreach (FieldInfo field in Fields(type))
            {
                string name = $"{type.Name}.{field.Name}";
                string place = $"{SizeOf(field.FieldType)} bytes at {Marshal.OffsetOf(type, field.Name)}";
                string header = $"{_says[$"{name} size"]} bytes at {_says[$"{name} offset"]}";
                if (place != header)
                    yield return $"{name} has {place}, the header says {header}";
            }
        }
    }

    private IEnumerable<string> OfFunctions()
    {
        foreach ((MethodInfo method, _) in Bindings.Functions)
        {
            string name = Symbol(method);
            if (_says[$"{name} parameters"] != $"{method.GetParameters().Length}")
            {
                yield return $"{name} has {method.GetParameters().Length} parameters, the header says {_says[$"{name} parameters"]}";
                continue;
            }

            foreach ((int place, Type type) in Places(method))
            {
                string says = _says[$"{name} {place}"], what = place == 0 ? "returns" : $"takes as parameter {place}";
                if (!Fits(type, says))
                    yield return $"{name} {what} {type.Name}, the header says '{says}' (kind, bytes, bytes of what it points to)";
                if (_says.GetValueOrDefault($"{name} {place} named") == "0")
                    yield return $"{name} {what} {type.Name}, the header has another type";
            }
        }
    }

    /// <summary>Whether a type is passed as the header's is: in the same registers, and as wide where it is pointed to.</summary>
    private static bool Fits(Type type, string says)
    {
        string[] words = says.Split(' ');
        string kind = words[0];
        int bytes = int.Parse(words[1], CultureInfo.InvariantCulture), pointee = int.Parse(words[2], CultureInfo.InvariantCulture);
        if (type == typeof(void))
            return kind == "void";
        if (type == typeof(string) || type.IsArray)
            return kind == "pointer" && pointee == (type.IsArray ? nint.Size : sizeof(byte));
        if (type.IsByRef || type.IsPointer)
        {
            Type element = type.GetElementType()!;
            bool any = element == typeof(void) || pointee == 0 || Bindings.MayBeShorter(element);
            return kind == "pointer" && (any || pointee == SizeOf(element));
        }

        if (bytes != SizeOf(type))
            return false;
        if (type == typeof(nint) || type == typeof(nuint))
            return kind is "pointer" or "signed" or "unsigned"; // handles, addresses on the device, sizes
        if (type.IsEnum)
            return kind == "enum";
        if (type == typeof(float) || type == typeof(double))
            return kind == "float";
        if (type == typeof(byte) || type == typeof(ushort) || type == typeof(uint) || type == typeof(ulong))
            return kind == "unsigned";
        if (type == typeof(sbyte) || type == typeof(short) || type == typeof(int) || type == typeof(long))
            return kind == "signed";
        return kind == "struct" && Bindings.Structs.Contains(type);
    }

    private static IEnumerable<FieldInfo> Numbers() =>
        Bindings.Enums.SelectMany(type => type.GetFields(BindingFlags.Static | BindingFlags.Public)).Concat(Bindings.Constants);

    private static FieldInfo[] Fields(Type type) => type.GetFields(BindingFlags.Instance | BindingFlags.Public | BindingFlags.NonPublic);

    /// <summary>The return type, at place 0, and the parameters.</summary>
    private static IEnumerable<(int Place, Type Type)> Places(MethodInfo method) =>
        [(0, method.ReturnType), .. method.GetParameters().Select((parameter, i) => (i + 1, parameter.ParameterType))];

    /// <summary>The enum or struct of the header's that a type is or points to.</summary>
    private static Type? Named(Type type)
    {
        Type bare = type.IsByRef || type.IsPointer ? type.GetElementType()! : type;
        return Bindings.Enums.Contains(bare) || Bindings.Structs.Contains(bare) ? bare : null;
    }

    private static string Symbol(MethodInfo method) => method.GetCustomAttribute<LibraryImportAttribute>()!.EntryPoint ?? method.Name;

    private static int SizeOf(Type type) => RuntimeHelpers.SizeOf(type.TypeHandle);
}
