using System.Runtime.InteropServices;
using System.Runtime.Loader;
using System.Security.Cryptography;

namespace Rollout.Client.Torch;

/// <summary>
/// Makes TorchSharp's native library load where the C++ runtime is older than GCC 13 (Debian 12, Ubuntu 22.04, RHEL 9).
/// libLibTorchSharp.so says it needs GLIBCXX_3.4.32 but uses nothing of it: its one symbol of that version,
/// std::ios_base_library_init, has no relocation. When, and only when, the plain load fails for that reason, a private copy with
/// that one version marked weak is loaded instead.
/// </summary>
public static class TorchNative
{
    /// <summary>The version that GCC 13 added and that TorchSharp 0.107 requires without using it.</summary>
    public const string UnusedVersion = "GLIBCXX_3.4.32";

    private const string LibraryFile = "libLibTorchSharp.so";

    private static readonly Lock s_lock = new();
    private static bool s_loaded;
    private static nint s_handle;
    private static DataOf? s_dataOf;

    /// <summary>THSTensor_data of TorchSharp's library, which has no public method for it.</summary>
    private delegate nint DataOf(nint tensor);

    /// <summary>Whether this process uses the patched copy.</summary>
    public static bool IsMended { get; private set; }

    /// <summary>Call this before the first use of TorchSharp. Later calls do nothing.</summary>
    /// <exception cref="DllNotFoundException">
    /// The native libraries cannot be loaded, for a reason that this class does not handle.
    /// </exception>
    public static void EnsureLoaded()
    {
        lock (s_lock)
        {
            if (!s_loaded && OperatingSystem.IsLinux() && FindLibrary() is { } path)
                Load(path);
            s_loaded = true;
        }
    }

    /// <summary>The address of a tensor's first element: on its device.</summary>
    public static nint AddressOf(TorchSharp.torch.Tensor tensor)
    {
        EnsureLoaded();
        lock (s_lock)
            s_dataOf ??= Marshal.GetDelegateForFunctionPointer<DataOf>(NativeLibrary.GetExport(Library(), "THSTensor_data"));
        return s_dataOf(tensor.Handle);
    }

    private static nint Library()
        => s_handle != 0 ? s_handle : NativeLibrary.Load("LibTorchSharp", typeof(TorchSharp.torch).Assembly, searchPath: null);

    /// <summary>The library as the host would find it, or null: then TorchSharp's own search reports what is missing.</summary>
    internal static string? FindLibrary()
    {
        IEnumerable<string> directories = (AppContext.GetData("NATIVE_DLL_SEARCH_DIRECTORIES") as string ?? "")
            .Split(Path.PathSeparator, StringSplitOptions.RemoveEmptyEntries)
            .Append(AppContext.BaseDirectory)
            .Append(Path.Combine(AppContext.BaseDirectory, "runtimes", RuntimeInformation.RuntimeIdentifier, "native"));
        return directories.Select(directory => Path.Combine(directory, LibraryFile)).FirstOrDefault(File.Exists);
    }

    /// <summary>Writes the patched copy of <paramref name="library"/> under <paramref name="cache"/>, unless it is there already.</summary>
    /// <returns>The path of the copy.</returns>
    internal static string Mend(string library, string cache)
    {
        byte[] image = File.ReadAllBytes(library);
        string key = Convert.ToHexStringLower(SHA256.HashData(image))[..16];
        ElfVersions elf = new(image, library);
        foreach (ElfVersionNeed need in elf.Needs.Where(need => need.Name == UnusedVersion))
            elf.MarkWeak(need);

        string directory = Path.Combine(cache, $"torchsharp-{key}");
        CreatePrivateDirectory(directory);
        string copy = Path.Combine(directory, LibraryFile);
        if (File.Exists(copy) && image.AsSpan().SequenceEqual(File.ReadAllBytes(copy)))
            return copy;

        // Two processes may do this at once. Each writes its own file; the renames are atomic and leave the same bytes.
        string partial = Path.Combine(directory, $"{LibraryFile}.{Environment.ProcessId}.{Guid.NewGuid():n}");
        try
        {
            File.WriteAllBytes(partial, image);
            File.Move(partial, copy, overwrite: true);
        }
        finally
        {
            File.Delete(partial);
        }

        return copy;
    }

    private static void Load(string path)
    {
        // libtorch comes first: the copy lives in another folder, where its $ORIGIN finds nothing, but the loader satisfies a
        // needed library with one of that name already in the process. So half a gigabyte of libtorch is not copied.
        foreach (string name in (string[])["libtorch_cuda.so", "libtorch.so"])
        {
            if (FindBeside(path, name) is { } torch)
                NativeLibrary.Load(torch);
        }

        try
        {
            s_handle = NativeLibrary.Load(path);
            return;
        }
        catch (DllNotFoundException error) when (error.Message.Contains($"version `{UnusedVersion}' not found", StringComparison.Ordinal))
        {
        }

        nint handle = s_handle = NativeLibrary.Load(MendSomewhere(path));
        IsMended = true;
        AssemblyLoadContext context = AssemblyLoadContext.GetLoadContext(typeof(TorchSharp.torch).Assembly) ?? AssemblyLoadContext.Default;
        // Called when the normal search has failed, by P/Invoke and by TorchSharp's own start-up.
        context.ResolvingUnmanagedDll += (_, name) => name is "LibTorchSharp" or LibraryFile ? handle : 0;
    }

    private static string? FindBeside(string library, string name)
    {
        string[] directories = (AppContext.GetData("NATIVE_DLL_SEARCH_DIRECTORIES") as string ?? "").Split(Path.PathSeparator);
        return directories.Prepend(Path.GetDirectoryName(library)!).Where(directory => directory.Length > 0)
            .Select(directory => Path.Combine(directory, name)).FirstOrDefault(File.Exists);
    }

    private static string MendSomewhere(string library)
    {
        string? root = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        if (string.IsNullOrEmpty(root))
            root = Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache");
        try
        {
            return Mend(library, Path.Combine(root, "rollout"));
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            // No writable home folder (a service account, a read-only container): use a folder for this process only.
            return Mend(library, Directory.CreateTempSubdirectory("rollout-").FullName);
        }
    }

    private static void CreatePrivateDirectory(string path)
    {
        if (OperatingSystem.IsWindows())
            Directory.CreateDirectory(path);
        else
            Directory.CreateDirectory(path, UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute);
    }
}
