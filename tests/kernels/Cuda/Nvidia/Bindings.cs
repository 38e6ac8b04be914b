using System.Reflection;
using System.Runtime.InteropServices;
using Rollout.Kernels.Cuda;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>All bindings of native/ and kernels/Cuda/Native, by reflection, with their names in NVIDIA's headers.</summary>
internal static class Bindings
{
    // The only names that differ from the headers', apart from the endings below. A field may be a path there: "location.type".
    private static readonly Dictionary<string, string> s_headerNames = new()
    {
        ["ncclUniqueId"] = "ncclUniqueId",
        ["cublasLtMatmulHeuristicResult.Algorithm"] = "algo",
        ["cublasLtMatmulHeuristicResult.WorkspaceBytes"] = "workspaceSize",
        ["ConfigVersion"] = "NCCL_VERSION(2, 14, 0)",
    };

    /// <summary>Structs of an older header, which newer ones only add to: their size may be less.</summary>
    private static readonly Type[] s_shorter = [typeof(ncclConfig)];

    /// <summary>The file of each library in the folder of <see cref="NvidiaFiles"/>, by the name that bindings import from.</summary>
    public static readonly Dictionary<string, string> Libraries = new()
    {
        [CudaLibraries.Driver] = "lib/libcuda.so.1",
        [CudaLibraries.Nvrtc] = "lib/libnvrtc.so.12",
        [CudaLibraries.CublasLt] = "lib/libcublasLt.so.12",
        [CudaLibraries.Nccl] = "lib/libnccl.so.2",
    };

    private static readonly Type[] s_types = [.. typeof(Driver).Assembly.GetTypes(), .. typeof(CublasLt).Assembly.GetTypes()];

    /// <summary>Every function, with the library that it is imported from.</summary>
    public static (MethodInfo Method, string Library)[] Functions { get; } =
    [
        .. from type in s_types
           from method in type.GetMethods(BindingFlags.Static | BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.DeclaredOnly)
           let import = method.GetCustomAttribute<LibraryImportAttribute>()
           where import is not null && Libraries.ContainsKey(import.LibraryName)
           select (method, import.LibraryName),
    ];

    public static Type[] Enums { get; } = [.. s_types.Where(type => type.IsEnum && IsHeaders(type))];

    public static Type[] Structs { get; } = [.. s_types.Where(type => type.IsValueType && !type.IsEnum && IsHeaders(type))];

    /// <summary>Flags and other numbers: constants of the classes that import functions.</summary>
    public static FieldInfo[] Constants { get; } =
    [
        .. from type in Functions.Select(function => function.Method.DeclaringType!).Distinct()
           from field in type.GetFields(BindingFlags.Static | BindingFlags.Public | BindingFlags.NonPublic)
           where field.IsLiteral
           select field,
    ];

    public static bool MayBeShorter(Type type) => s_shorter.Contains(type);

    public static string HeaderName(Type type) =>
        s_headerNames.GetValueOrDefault(type.Name, Starts(type, "CU") || Starts(type, "nvrtc") ? type.Name : $"{type.Name}_t");

    public static string HeaderName(FieldInfo field)
    {
        if (field.IsLiteral)
            return s_headerNames.GetValueOrDefault(field.Name, field.Name);
        string camelCase = char.ToLowerInvariant(field.Name[0]) + field.Name[1..];
        return s_headerNames.GetValueOrDefault($"{field.DeclaringType!.Name}.{field.Name}", camelCase);
    }

    private static bool IsHeaders(Type type) =>
        type.DeclaringType is null && ((string[])["CU", "cublas", "cuda", "nccl", "nvrtc"]).Any(start => Starts(type, start));

    private static bool Starts(Type type, string start) => type.Name.StartsWith(start, StringComparison.Ordinal);
}
