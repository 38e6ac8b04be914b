using System.Security.Cryptography;
using System.Text;

namespace Rollout.Kernels.Cuda;

/// <summary>Compiles CUDA C++ for one kind of device with NVRTC, and caches the result on disk under a hash of all inputs.</summary>
internal static unsafe class CudaCompiler
{
    /// <summary>Where compiled kernels are kept: $XDG_CACHE_HOME/rollout, or ~/.cache/rollout.</summary>
    public static string CacheFolder => Path.Combine(
        Environment.GetEnvironmentVariable("XDG_CACHE_HOME") is { Length: > 0 } cache
            ? cache
            : Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache"),
        "rollout");

    /// <summary>The code of one source, compiled now or at an earlier start.</summary>
    /// <param name="name">For people: "step.cu".</param>
    /// <param name="source">CUDA C++.</param>
    /// <param name="headers">What it includes, by name.</param>
    /// <param name="options">NVRTC's: the architecture, definitions.</param>
    /// <exception cref="CudaException">It does not compile; the message contains the compiler's.</exception>
    public static byte[] Compile(string name, string source, IReadOnlyDictionary<string, string> headers, string[] options)
    {
        Nvrtc.nvrtcVersion(out int major, out int minor).ThrowIfFailed();
        using IncrementalHash hash = IncrementalHash.CreateHash(HashAlgorithmName.SHA256);
        foreach (string part in (IEnumerable<string>)[
            $"{major}.{minor}", CudaLibraries.PathOf(CudaLibraries.Nvrtc), name, source, .. options,
            .. headers.OrderBy(header => header.Key, StringComparer.Ordinal).SelectMany(header => new[] { header.Key, header.Value })])
        {
            hash.AppendData(Encoding.UTF8.GetBytes(part));
            hash.AppendData([0]);
        }

        string key = Convert.ToHexStringLower(hash.GetHashAndReset().AsSpan(0, 16));
        string file = Path.Combine(CacheFolder, $"{Path.GetFileNameWithoutExtension(name)}-{key}.cubin");
        if (Kept(file) is { } kept)
            return kept;
        byte[] cubin = Run(name, source, headers, options);
        Keep(file, [.. cubin, .. SHA256.HashData(cubin)]);
        return cubin;
    }

    /// <summary>The cubin of a cache file, which its SHA-256 follows; null where the file is missing, unreadable or damaged.</summary>
    private static byte[]? Kept(string file)
    {
        try
        {
            byte[] bytes = File.Exists(file) ? File.ReadAllBytes(file) : [];
            int length = bytes.Length - SHA256.HashSizeInBytes;
            if (length <= 0)
                return null;
            bool whole = SHA256.HashData(bytes.AsSpan(0, length)).AsSpan().SequenceEqual(bytes.AsSpan(length));
            return whole ? bytes[..length] : null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    private static byte[] Run(string name, string source, IReadOnlyDictionary<string, string> headers, string[] options)
    {
        Nvrtc.nvrtcCreateProgram(out nint program, source, name, headers.Count, [.. headers.Values], [.. headers.Keys]).ThrowIfFailed(name);
        try
        {
            nvrtcResult result = Nvrtc.nvrtcCompileProgram(program, options.Length, options);
            if (result != nvrtcResult.NVRTC_SUCCESS)
            {
                string answer = $"{result.Name()}\n{Log(program)}";
                throw new CudaException(nameof(Nvrtc.nvrtcCompileProgram), answer.TrimEnd('\n'), name);
            }

            Nvrtc.nvrtcGetCUBINSize(program, out nuint bytes).ThrowIfFailed(name);
            byte[] cubin = new byte[bytes];
            fixed (byte* destination = cubin)
                Nvrtc.nvrtcGetCUBIN(program, destination).ThrowIfFailed(name);
            return cubin;
        }
        finally
        {
            _ = Nvrtc.nvrtcDestroyProgram(ref program); // the earlier failure is the one to report
        }
    }

    private static string Log(nint program)
    {
        Nvrtc.nvrtcGetProgramLogSize(program, out nuint bytes).ThrowIfFailed();
        byte[] log = new byte[bytes];
        fixed (byte* destination = log)
            Nvrtc.nvrtcGetProgramLog(program, destination).ThrowIfFailed();
        return Encoding.UTF8.GetString(log).TrimEnd('\0', '\n');
    }

    /// <summary>
    /// Writes the file whole or not at all: several processes may start at once. When the disk is full or not writable, the next start only
    /// has to compile again.
    /// </summary>
    internal static void Keep(string file, byte[] bytes)
    {
        try
        {
            Directory.CreateDirectory(Path.GetDirectoryName(file)!);
            string partial = $"{file}.{Path.GetRandomFileName()}";
            File.WriteAllBytes(partial, bytes);
            File.Move(partial, file, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
        }
    }
}
