namespace Rollout.Gpu;

/// <summary>Stage 6: PyTorch, transformers and vLLM where they are installed: peer.py writes its rows itself.</summary>
internal static class Peers
{
    public static IReadOnlyList<Part> Parts { get; } =
    [
        Script("ceilings", 25),
        Script("goldens", 25),
        Script($"transformers {Shapes.Qwen25}", 40),
        Script($"transformers {Shapes.Llama}", 45),
        Script($"vllm {Shapes.Qwen25}", 90),
    ];

    private static Part Script(string what, int seconds) => new(what, seconds, stage => Python.RunAsync(
        "peer.py", [what, "--out", stage.Output, "--root", Stage.Root, .. stage.IsSmall ? ["--small"] : Array.Empty<string>()]));
}
