namespace Rollout.Gpu;

/// <summary>Stage 6: PyTorch, transformers and vLLM where they are installed; peer.py writes its own rows.</summary>
internal static class Peers
{
    public static IReadOnlyList<Part> Parts { get; } =
    [
        Script("ceilings", 30),
        Script("goldens", 40),
        Script($"transformers {Shapes.Qwen25}", 40),
        Script($"transformers {Shapes.Llama}", 60),
        Script($"vllm {Shapes.Qwen25}", 90),
    ];

    private static Part Script(string what, int seconds) => new(what, seconds, async stage =>
    {
        string[] size = stage.IsSmall ? ["--small"] : [];
        if (await Python.HasAsync("sys"))
            await Python.RunAsync("peer.py", [what, "--out", stage.Output, "--root", Stage.Root, .. size]);
        else
            stage.Write("Peers", what, "result", "python3 is not installed");
    });
}
