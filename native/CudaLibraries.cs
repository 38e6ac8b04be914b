using System.Collections.Concurrent;
using System.Reflection;
using System.Runtime.InteropServices;

namespace Rollout.Native;

/// <summary>
/// Where NVIDIA's libraries are. They come with the driver, the toolkit, pip's or TorchSharp's packages, each in different folders; the
/// first that loads is used: ROLLOUT_CUDA_PATH, CUDA_HOME and CUDA_PATH, /usr/local/cuda, packages beside this program, what the system's
/// loader knows, and for the driver the folders where it is installed on systems whose loader does not know it.
/// </summary>
internal static class CudaLibraries
{
    public const string Driver = "cuda";
    public const string Nvrtc = "nvrtc";
    public const string CublasLt = "cublasLt";
    public const string Nccl = "nccl";

    /// <summary>
    /// Folders to look in first, separated by colons: a toolkit's, pip's site-packages/nvidia, or the simulated device's.
    /// </summary>
    public const string PathVariable = "ROLLOUT_CUDA_PATH";

    // Newest first: a machine may have several.
    private static readonly Dictionary<string, string[]> s_files = new()
    {
        [Driver] = ["libcuda.so.1"],
        [Nvrtc] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"],
        [CublasLt] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"],
        [Nccl] = ["libnccl.so.2", "libnccl.so"],
    };

    // Of a container's host, of Debian and Ubuntu, of WSL: after the loader, which may be configured for a newer driver's libraries.
    private static readonly string[] s_driverFolders =
        ["/usr/local/nvidia/lib64", "/usr/local/nvidia/lib", "/usr/lib/x86_64-linux-gnu", "/usr/lib/wsl/lib"];

    private static readonly ConcurrentDictionary<string, (nint Handle, string Path)> s_loaded = new();

    private static readonly HashSet<Assembly> s_resolved = [];

    /// <summary>
    /// Makes the bindings of an assembly load the libraries found here. The static constructor of every class of bindings does so.
    /// </summary>
    public static void ResolveFor(Assembly assembly)
    {
        lock (s_resolved)
        {
            if (s_resolved.Add(assembly))
                NativeLibrary.SetDllImportResolver(assembly, static (name, _, _) => s_files.ContainsKey(name) ? Load(name) : 0);
        }
    }

    /// <summary>
    /// One sentence that names the first of these libraries which cannot be found, and where it was looked for; null when all are.
    /// </summary>
    public static string? Missing(params ReadOnlySpan<string> names)
    {
        foreach (string name in names)
        {
            if (Load(name) == 0)
            {
                IEnumerable<string?> folders = Candidates(name).Select(Path.GetDirectoryName).Where(folder => folder != "").Distinct();
                return $"CUDA needs {string.Join(" or ", s_files[name])}, which is in none of {string.Join(", ", folders)} "
                    + $"and not known to the system's loader; set {PathVariable} to the folder that has it.";
            }
        }

        return null;
    }

    /// <summary>The file that was loaded, or the name by which the system's loader found it; "" where it is missing.</summary>
    public static string PathOf(string name) => Load(name) != 0 ? s_loaded[name].Path : "";

    /// <summary>Where libraries are looked for before the system's loader is asked, in order.</summary>
    private static IEnumerable<string> Folders()
    {
        IEnumerable<string> roots = [
            .. (Environment.GetEnvironmentVariable(PathVariable) ?? "").Split(':', StringSplitOptions.RemoveEmptyEntries),
            .. new[] { "CUDA_HOME", "CUDA_PATH" }.Select(Environment.GetEnvironmentVariable).OfType<string>()
                .Where(path => path.Length > 0),
            "/usr/local/cuda",
        ];
        return [
            .. roots.SelectMany(Within),
            AppContext.BaseDirectory,
            Path.Combine(AppContext.BaseDirectory, "runtimes/linux-x64/native"), // TorchSharp's packages
        ];
    }

    /// <summary>The files that a library is looked for in, in order; those without a folder are left to the system's loader.</summary>
    internal static IEnumerable<string> Candidates(string name) =>
    [
        .. Folders().SelectMany(folder => s_files[name].Select(file => Path.Combine(folder, file))),
        .. s_files[name],
        .. (name == Driver ? s_driverFolders : []).SelectMany(folder => s_files[name].Select(file => Path.Combine(folder, file))),
    ];

    /// <summary>A folder of libraries, of a toolkit (lib64), or of pip's packages (cublas/lib, cu13/lib, ...).</summary>
    private static IEnumerable<string> Within(string root)
    {
        yield return root;
        yield return Path.Combine(root, "lib64");
        yield return Path.Combine(root, "lib");
        if (!Directory.Exists(root))
            yield break;
        foreach (string package in Directory.EnumerateDirectories(root).Order(StringComparer.Ordinal))
        {
            if (Directory.Exists(Path.Combine(package, "lib")))
                yield return Path.Combine(package, "lib");
        }
    }

    private static nint Load(string name)
    {
        // A library that was not found is looked for again: a test or a user may have set the path meanwhile.
        if (s_loaded.TryGetValue(name, out (nint Handle, string Path) loaded))
            return loaded.Handle;
        foreach (string file in Candidates(name).Where(file => !Path.IsPathRooted(file) || File.Exists(file)))
        {
            if (name == Nvrtc)
                LoadBuiltins(Path.GetDirectoryName(file)!);
            if (NativeLibrary.TryLoad(file, out nint handle))
                return s_loaded.GetOrAdd(name, (handle, file)).Handle;
        }

        return 0;
    }

    /// <summary>
    /// The compiler opens the library of its builtins by name when it compiles, and the system's loader does not search the compiler's
    /// folder, but finds libraries that are already loaded. Of several versions the compiler uses its own.
    /// </summary>
    private static void LoadBuiltins(string folder)
    {
        if (folder == "")
            return; // the system's loader found the compiler, and will find them too
        foreach (string file in Directory.EnumerateFiles(folder, "libnvrtc-builtins.so*").Order(StringComparer.Ordinal))
            _ = NativeLibrary.TryLoad(file, out _); // if one cannot be loaded, the compiler names it when it needs it
    }
}
