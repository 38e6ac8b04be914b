using System.Globalization;
using System.Runtime.InteropServices;
using System.Security.Cryptography;
using System.Text;

namespace Rollout.Kernels.Cuda;

/// <summary>
/// Choices of earlier starts, a file each: the digest of the class, an algorithm for each bucket of rows, and a digest of the text before
/// it, all in hexadecimal. A choice that is damaged, of another version, or missing is made again.
/// </summary>
/// <param name="folder">Created when it is first written to.</param>
/// <param name="device">What the choices are valid for: the device, the library and its version, the types.</param>
internal sealed class MatMulFile(string folder, string device)
{
    /// <summary>
    /// Version of the file format, of the rule that chooses, and of the numbers that digests are computed from: files of another version
    /// are not read.
    /// </summary>
    private const int Version = 2;

    private static readonly int s_algorithms = MatMulTuner.Buckets.Length + 1;

    /// <summary>Null where there is none that can be read.</summary>
    public MatMulChoice? Read(int outputs, int inputs)
    {
        string path = PathOf(outputs, inputs);
        try
        {
            if (!File.Exists(path))
                return null;
            string[] words = File.ReadAllText(path).Split(' ');
            if (words.Length != s_algorithms + 2 || words[^1] != DigestOf(string.Join(' ', words[..^1])))
                return null;
            return new MatMulChoice(Convert.FromHexString(words[0]), [.. words[1..^1].Select(Algorithm)]);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null; // treated as missing
        }
    }

    public void Write(int outputs, int inputs, MatMulChoice choice)
    {
        string text = string.Join(' ', choice.Algorithms.Select(MatMulTuner.Text).Prepend(Convert.ToHexStringLower(choice.Digest)));
        CudaCompiler.Keep(PathOf(outputs, inputs), Encoding.ASCII.GetBytes($"{text} {DigestOf(text)}"));
    }

    private static cublasLtMatmulAlgo Algorithm(string hex) => MemoryMarshal.Read<cublasLtMatmulAlgo>(Convert.FromHexString(hex));

    private static string DigestOf(string text) => Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes(text)))[..32];

    private string PathOf(int outputs, int inputs) => Path.Combine(folder, string.Create(
        CultureInfo.InvariantCulture, $"matmul-{DigestOf($"{Version} {device} {outputs} {inputs}")}.txt"));
}
