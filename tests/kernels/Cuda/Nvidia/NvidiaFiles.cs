using System.Runtime.CompilerServices;
using Xunit;

namespace Rollout.Kernels.Tests.Cuda;

/// <summary>
/// NVIDIA's own libraries, headers and tools, which tests/nvidia/fetch.sh unpacks: in the folder that ROLLOUT_TEST_NVIDIA names, or else
/// where the script puts them by default. Tests that need a file which is not there skip.
/// </summary>
internal static class NvidiaFiles
{
    public const string FolderVariable = "ROLLOUT_TEST_NVIDIA";

    /// <summary>A folder with the headers of another toolkit, which the bindings are compared with too: /usr/local/cuda/include.</summary>
    public const string IncludeVariable = "ROLLOUT_TEST_CUDA_INCLUDE";

    private static string s_folder = "";

    /// <summary>The folder, once it is known to have these files.</summary>
    public static string Require(params ReadOnlySpan<string> files)
    {
        foreach (string file in files)
        {
            if (!Path.Exists(Path.Combine(s_folder, file)))
                Assert.Skip($"there is no {file} in {s_folder}, which tests/nvidia/fetch.sh fills; {FolderVariable} names another folder");
        }

        return s_folder;
    }

    /// <summary>Read before tests of the simulated device set XDG_CACHE_HOME.</summary>
    [ModuleInitializer]
    internal static void Find()
    {
        string cache = Environment.GetEnvironmentVariable("XDG_CACHE_HOME") is { Length: > 0 } set
            ? set
            : Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache");
        s_folder = Environment.GetEnvironmentVariable(FolderVariable) is { Length: > 0 } folder
            ? folder
            : Path.Combine(cache, "rollout-ci", "nvidia");
    }
}
